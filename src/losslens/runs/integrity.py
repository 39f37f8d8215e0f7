"""Checks that a run's folder holds what was written into it: its manifest is of this run, its outcomes are its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from losslens.config.identity import in_current_words
from losslens.config.training import LearningRate, Optim
from losslens.core.commands import called, spoken
from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.losses import builtin_losses

_SECONDS = 0.3


def bound_to(manifest: Mapping[str, Any]) -> str:
    """Fingerprint of a run, for its checkpoints and snapshots: its identity, its rollouts, its initial adapter.

    Args:
        manifest: The run's.
    """
    parts = (manifest.get("identity"), *(_of(manifest, f"{name}.sha256") for name in ("rollouts", "initial_adapter")))
    return hash_json(parts, 64)


def require_own_manifest(folder: Path, manifest: Any) -> None:
    """Refuses a manifest that is not of the run, the base or the snapshot in whose folder it lies.

    A folder's name ends in the hash of what decides the run (`identity`), and the tables read what the manifest repeats
    of it: the method, its options, rates, ranks, seeds, the base.

    Raises:
        InputError: It does not fit.
    """
    file = folder / "manifest.json"
    if not isinstance(manifest, dict):
        raise InputError(f"{file}: not the manifest of a run")
    for name, given, expected in _claims(folder, manifest):
        if given != expected:
            raise InputError(
                f"{file}: {name} is {_short(given)}, and by the identity of this run {_short(expected)}: changed, or "
                f"of another run; delete {folder} to make it again"
            )


def require_format(folder: Path, manifest: Any) -> None:
    """Refuses a run whose identity an earlier LossLens wrote: it would not be known as the same run.

    Raises:
        InputError: Says how it is taken over.
    """
    if not isinstance(manifest, dict):
        return
    identity, before = manifest.get("identity"), manifest.get("migrated_from")
    is_of_before = isinstance(identity, dict) and "format" not in identity
    # It was killed before the folder got its new name.
    is_begun = isinstance(before, dict) and before.get("run") == folder.name != manifest.get("run")
    if is_of_before or is_begun:
        raise InputError(
            f"{folder}: a run of an earlier LossLens, which named runs otherwise; "
            f"{spoken('launch/migrate.py')} output_dir={folder.parents[1]} takes it over as it is"
        )


def record_outcomes(folder: Path, file: Path) -> None:
    """Notes the hash of a file of outcomes in the manifest of `folder`; the caller holds the run's lock."""
    manifest = read_json(folder / "manifest.json")
    # One from before hashes were kept gets those of all that is there.
    files = [file] if "outcomes" in manifest else [file, *folder.glob("eval/*.parquet")]
    outcomes = {**_recorded(manifest), **{each.name: hash_file(each) for each in files}}
    write_json(folder / "manifest.json", {**manifest, "outcomes": outcomes})


def are_recorded(folder: Path, file: Path) -> bool | None:
    """Whether a file of outcomes is as it was written; None where the manifest is from before hashes were kept."""
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    if not isinstance(manifest, dict) or "outcomes" not in manifest:
        return None
    return file.is_file() and _recorded(manifest).get(file.name) == hash_file(file)


def require_recorded_outcomes(folder: Path) -> bool:
    """Refuses outcomes that are not as they were written, and a folder from which some are gone.

    Returns:
        Whether there were hashes to compare with: a manifest may be from before they were kept.

    Raises:
        InputError: Names the file.
    """
    fault = _fault_of_outcomes(folder)
    if fault:
        # Another process may be between writing a file and noting its hash.
        time.sleep(_SECONDS)
        fault = _fault_of_outcomes(folder)
    if fault:
        raise InputError(f"{fault}; the same {called('train.py')} or {called('evaluate.py')} command scores it again")
    return "outcomes" in read_json(folder / "manifest.json")


def _fault_of_outcomes(folder: Path) -> str:
    manifest = read_json(folder / "manifest.json")
    if "outcomes" not in manifest:
        return ""
    recorded = _recorded(manifest)
    files = {file.name: file for file in sorted(folder.glob("eval/*.parquet"))}
    for name in sorted(recorded.keys() - files.keys()):
        return f"{folder / 'eval' / name}: gone, though manifest.json has its hash"
    for name, file in files.items():
        if recorded.get(name) != hash_file(file):
            return f"{file}: not the outcomes that were written (manifest.json has another hash)"
    return ""


def _recorded(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    recorded = manifest.get("outcomes")
    return recorded if isinstance(recorded, dict) else {}


def _claims(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What the manifest says, what it would have to say, and where."""
    identity = manifest.get("identity")
    require_format(folder, manifest)
    suffix = folder.name.rpartition("-")[2]
    if folder.parent.name == "snapshots":
        run = folder.parents[1] / "manifest.json"
        if folder.name.startswith("step-") and "run" in manifest:
            yield "step", manifest.get("step"), int(suffix) if suffix.isdigit() else suffix
            if run.exists():
                yield "run", manifest["run"], bound_to(read_json(run))
        return
    if folder.name.startswith("base-") and manifest.get("method") == "base":
        yield "base", hash_json(manifest.get("base"), 8), suffix
        yield "config.model.name", f"base-{_of(manifest, 'config.model.name')}-{suffix}", folder.name
        return
    if not isinstance(identity, dict):
        raise InputError(f"{folder / 'manifest.json'}: no identity in it: not the manifest of a run")
    yield "identity", hash_json(identity, 8), suffix
    yield "run", manifest.get("run"), folder.name
    yield "method", manifest.get("method"), _of(identity, "method.name")
    for name in ("config.seed", "config.init_seed", "learning_rate", "base"):
        yield name, _of(manifest, name), identity.get(name.removeprefix("config."))
    yield "config.lora_rank.r", _of(manifest, "config.lora_rank.r"), _of(identity, "lora.r")
    yield "config.lr", _rate(manifest), identity.get("learning_rate")
    yield from _claims_of_options(folder / "manifest.json", manifest, identity)
    given, expected = _of(manifest, "config.optim"), identity.get("optim")
    if isinstance(given, dict) and isinstance(expected, dict):
        expected = in_current_words(Optim, expected)
        for name in given.keys() & expected.keys():
            yield f"config.optim.{name}", given[name], expected[name]


def _claims_of_options(
    file: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The loss's options stand in full in the manifest, in its configuration, and without defaults in the identity."""
    decided, options = identity.get("method"), manifest.get("options")
    if not isinstance(decided, dict) or not isinstance(options, dict):
        raise InputError(f"{file}: no options of its loss in it: not the manifest of a run")
    loss, version = decided.get("name"), decided.get("version")
    own = builtin_losses().get(str(loss))
    given = _of(manifest, "config.method")
    if not isinstance(given, dict):
        raise InputError(f"{file}: config.method: not the options of a loss")
    if own is None or own.version != version:  # the defaults are not known here, or not those of then
        meant = {"name": loss, "version": version, **options}
        yield "options", {name: meant.get(name) for name in decided}, decided
        yield "config.method.name", given.get("name"), loss
        return
    asked = {name: value for name, value in given.items() if name != "_target_"}
    for where, values in (("options", {"name": loss, **options}), ("config.method", asked)):
        try:
            yield where, own(**values).identity, decided
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{file}: {where}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _rate(manifest: Mapping[str, Any]) -> Any:
    """The learning rate that the configuration means."""
    asked = _of(manifest, "config.lr")
    try:
        return LearningRate.model_validate(asked).of(manifest.get("conventional_lr_scale", 1.0))
    except (ValidationError, TypeError):
        return asked


def _of(content: Any, path: str) -> Any:
    """The value at `a.b.c`; an empty mapping where there is none."""
    for name in path.split("."):
        content = content.get(name, {}) if isinstance(content, Mapping) else {}
    return content


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
