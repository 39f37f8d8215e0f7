"""Integrity checks of run folders: the manifest belongs to the run, and its outcomes are unchanged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from losslens.config.identity import in_current_words
from losslens.config.training import LearningRate, Optim
from losslens.core.commands import command_name, typed_command
from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.losses import builtin_methods

_RETRY_SECONDS = 0.3


def run_fingerprint(manifest: Mapping[str, Any]) -> str:
    """Returns the fingerprint recorded in a run's checkpoints and snapshots: identity, rollouts and initial adapter.

    Args:
        manifest: The run's manifest.
    """
    parts = (manifest.get("identity"), *(_at(manifest, f"{name}.sha256") for name in ("rollouts", "initial_adapter")))
    return hash_json(parts, 64)


def require_own_manifest(folder: Path, manifest: Any) -> None:
    """Checks that a manifest belongs to the run, base or snapshot in whose folder it is.

    A folder's name ends in the hash of the run's `identity`. The manifest repeats parts of the identity (method,
    options, learning rate, rank, seeds, base), which tables read, so they must agree with it.

    Raises:
        InputError: A field disagrees with the identity or the folder's name.
    """
    file = folder / "manifest.json"
    if not isinstance(manifest, dict):
        raise InputError(f"{file}: not the manifest of a run")
    for name, actual, expected in _claims(folder, manifest):
        if actual != expected:
            raise InputError(
                f"{file}: {name} is {_short(actual)}, but the identity of this run says {_short(expected)}: the file "
                f"was changed or belongs to another run; delete {folder} to train it again"
            )


def require_format(folder: Path, manifest: Any) -> None:
    """Refuses a run with the identity format of an earlier version, which would not be recognised as the same run.

    Raises:
        InputError: The run must be migrated first; the message says how.
    """
    if not isinstance(manifest, dict):
        return
    identity, origin = manifest.get("identity"), manifest.get("migrated_from")
    has_old_identity = isinstance(identity, dict) and "format" not in identity
    # The migration was interrupted before the folder was renamed.
    is_half_migrated = isinstance(origin, dict) and origin.get("run") == folder.name != manifest.get("run")
    if has_old_identity or is_half_migrated:
        raise InputError(
            f"{folder}: written by an earlier version of LossLens, which named runs differently; migrate it with "
            f"{typed_command('launch/migrate.py')} output_dir={folder.parents[1]} (nothing is trained again)"
        )


def record_outcomes(folder: Path, file: Path) -> None:
    """Records the hash of an outcome file in the manifest of `folder`; the caller must hold the run's lock."""
    manifest = read_json(folder / "manifest.json")
    # A manifest of an earlier version has no hashes: record those of all existing files.
    files = [file] if "outcomes" in manifest else [file, *folder.glob("eval/*.parquet")]
    outcomes = {**_recorded(manifest), **{path.name: hash_file(path) for path in files}}
    write_json(folder / "manifest.json", {**manifest, "outcomes": outcomes}, sealed=True)


def matches_recorded_hash(folder: Path, file: Path) -> bool | None:
    """Returns True if an outcome file matches its recorded hash; None if the manifest predates recorded hashes."""
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").exists() else {}
    if not isinstance(manifest, dict) or "outcomes" not in manifest:
        return None
    return file.is_file() and _recorded(manifest).get(file.name) == hash_file(file)


def require_recorded_outcomes(folder: Path) -> bool:
    """Checks that no outcome file of a folder has changed or is missing.

    Returns:
        True if there were recorded hashes to compare with; False for a manifest that predates them.

    Raises:
        InputError: A file has changed or is missing.
    """
    fault = _outcome_fault(folder)
    if fault:
        # Another process may have written a file but not yet recorded its hash.
        time.sleep(_RETRY_SECONDS)
        fault = _outcome_fault(folder)
    if fault:
        raise InputError(
            f"{fault}; run the same {command_name('train.py')} or {command_name('evaluate.py')} command again to "
            "score it anew"
        )
    return "outcomes" in read_json(folder / "manifest.json")


def _outcome_fault(folder: Path) -> str:
    manifest = read_json(folder / "manifest.json")
    if "outcomes" not in manifest:
        return ""
    recorded = _recorded(manifest)
    files = {file.name: file for file in sorted(folder.glob("eval/*.parquet")) if file.is_file()}
    for name in sorted(recorded.keys() - files.keys()):
        return f"{folder / 'eval' / name}: missing, although manifest.json records its hash"
    for name, file in files.items():
        if recorded.get(name) != hash_file(file):
            return f"{file}: does not match the hash recorded in manifest.json"
    return ""


def _recorded(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    recorded = manifest.get("outcomes")
    return recorded if isinstance(recorded, dict) else {}


def _claims(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name, the actual and the expected value of each field of the manifest that the identity determines."""
    identity = manifest.get("identity")
    require_format(folder, manifest)
    suffix = folder.name.rpartition("-")[2]
    if folder.parent.name == "snapshots":
        run = folder.parents[1] / "manifest.json"
        if folder.name.startswith("step-") and "run" in manifest:
            yield "step", manifest.get("step"), int(suffix) if suffix.isdigit() else suffix
            if run.exists():
                yield "run", manifest["run"], run_fingerprint(read_json(run))
        return
    if folder.name.startswith("base-") and manifest.get("method") == "base":
        yield "base", hash_json(manifest.get("base"), 8), suffix
        yield "config.model.name", f"base-{_at(manifest, 'config.model.name')}-{suffix}", folder.name
        return
    if not isinstance(identity, dict):
        raise InputError(f"{folder / 'manifest.json'}: not the manifest of a run: it has no identity")
    yield "identity", hash_json(identity, 8), suffix
    yield "run", manifest.get("run"), folder.name
    yield "method", manifest.get("method"), _at(identity, "method.name")
    for name in ("config.seed", "config.init_seed", "learning_rate", "base"):
        yield name, _at(manifest, name), identity.get(name.removeprefix("config."))
    yield "config.lora_rank.r", _at(manifest, "config.lora_rank.r"), _at(identity, "lora.r")
    yield "config.lr", _learning_rate(manifest), identity.get("learning_rate")
    yield from _option_claims(folder / "manifest.json", manifest, identity)
    actual, expected = _at(manifest, "config.optim"), identity.get("optim")
    if isinstance(actual, dict) and isinstance(expected, dict):
        expected = in_current_words(Optim, expected)
        for name in actual.keys() & expected.keys():
            yield f"config.optim.{name}", actual[name], expected[name]


def _option_claims(
    file: Path, manifest: Mapping[str, Any], identity: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """`_claims` about the loss's options: complete in manifest and configuration, without defaults in the identity."""
    expected, options = identity.get("method"), manifest.get("options")
    if not isinstance(expected, dict) or not isinstance(options, dict):
        raise InputError(f"{file}: not the manifest of a run: it has no options of the loss")
    name, version = expected.get("name"), expected.get("version")
    builtin = builtin_methods().get(str(name))
    configured = _at(manifest, "config.method")
    if not isinstance(configured, dict):
        raise InputError(f"{file}: config.method: not the options of a loss")
    if builtin is None or builtin.version != version:  # the defaults at that time are unknown
        actual = {"name": name, "version": version, **options}
        yield "options", {option: actual.get(option) for option in expected}, expected
        yield "config.method.name", configured.get("name"), name
        return
    configured = {option: value for option, value in configured.items() if option != "_target_"}
    for field, values in (("options", {"name": name, **options}), ("config.method", configured)):
        try:
            yield field, builtin(**values).identity, expected
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{file}: {field}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _learning_rate(manifest: Mapping[str, Any]) -> Any:
    """The learning rate that the configuration specifies."""
    configured = _at(manifest, "config.lr")
    try:
        return LearningRate.model_validate(configured).of(manifest.get("conventional_lr_scale", 1.0))
    except (ValidationError, TypeError):
        return configured


def _at(content: Any, path: str) -> Any:
    """The value at the path `a.b.c`; an empty mapping if there is none."""
    for name in path.split("."):
        content = content.get(name, {}) if isinstance(content, Mapping) else {}
    return content


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
