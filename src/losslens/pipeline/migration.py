"""Migration of runs of earlier versions: converts their identities to the current format and renames their folders.

Nothing is trained, scored or deleted. Each step is atomic, so that repeating the call completes an interrupted
migration.
"""

from __future__ import annotations

import pydoc
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from losslens.config.identity import FORMAT, in_current_words
from losslens.config.training import TRAIN_ON
from losslens.core.errors import InputError, first_line
from losslens.core.files import read_json, write_json
from losslens.core.hashing import hash_json
from losslens.losses import Loss, builtin_losses
from losslens.runs.integrity import run_fingerprint
from losslens.runs.run import LockedError, Run, find_run, runs_of
from losslens.runs.spec import OPTIMISER
from losslens.scheduling.status import refresh_run_statuses

# Versions of the old identity format: 2 before rollouts stored token ids, 3 after.
_OLD_VERSIONS = (2, 3)
_OLD_BUILTIN_PREFIX = "losslens.methods."


@dataclass(frozen=True)
class MigrationResult:
    """Result of the migration of a run.

    Attributes:
        run: Old name of its folder.
        name: New name of its folder.
        left: Why it was not migrated; empty if it was.
    """

    run: str
    name: str
    left: str = ""


class _NotMigratedError(Exception):
    """Raised with the reason why a run cannot be migrated."""


def migrate(output_dir: Path, sweep: str, losses: Collection[str] = ()) -> list[MigrationResult]:
    """Migrates the runs of a sweep to the current format.

    Args:
        output_dir: Folder of all sweeps.
        sweep: Name of the sweep.
        losses: Python paths of user-defined loss classes; no others are imported.

    Returns:
        The result for each run that was not in the current format.

    Raises:
        InputError: The sweep or a class in `losses` does not exist.
    """
    for name in losses:
        _own_class(name)
    runs = [run for run in runs_of(output_dir, sweep) if not run.name.startswith("base-")]
    results = []
    for run_status in refresh_run_statuses(run for run in runs if (run.folder / "manifest.json").exists()):
        run = run_status.run
        try:
            if run_status.is_live:
                raise _NotMigratedError(
                    f"its Slurm job is {run_status.state}: wait for it to finish, or cancel it (scancel)"
                )
            name = _migrate_run(run, losses)
        except _NotMigratedError as error:
            results.append(MigrationResult(run.name, run.name, str(error)))
            continue
        if name != run.name:
            results.append(MigrationResult(run.name, name))
    _rename_references(runs_of(output_dir, sweep))
    return results


def _migrate_run(run: Run, losses: Collection[str]) -> str:
    """Rewrites the files of a run in the current format, then renames its folder.

    Returns:
        New name of the folder.
    """
    with ExitStack() as stack:
        _lock(run, stack)
        manifest = _upgraded(run, losses)  # read only now that the run is locked
        target = Run(run.folder.with_name(manifest["run"]))
        if target == run:
            return run.name
        _lock(target, stack)
        existing = find_run(run.folder.parent, target.name.rpartition("-")[2])
        if existing is not None and existing != run:
            raise _NotMigratedError(f"it is the same run as {existing.name}; move or delete one of the two")
        now = run_fingerprint(manifest)
        before = run_fingerprint({**manifest, "identity": manifest["migrated_from"]["identity"]})
        snapshots = [(file, _snapshot(file)) for file in sorted(run.folder.glob("snapshots/step-*/manifest.json"))]
        write_json(run.folder / "manifest.json", manifest, sealed=True)
        for file, snapshot in snapshots:
            if snapshot.get("run") == before:
                write_json(file, {**snapshot, "run": now}, sealed=True)
        for checkpoint in sorted(run.folder.glob("checkpoints/checkpoint-*")):
            from losslens.training.callbacks import rewrite_checksums

            rewrite_checksums(checkpoint, before, now)
        run.folder.rename(target.folder)
    run.lock_file.unlink(missing_ok=True)
    return target.name


def _snapshot(file: Path) -> dict[str, Any]:
    """The manifest of a snapshot; empty if it is damaged, which leaves it unchanged."""
    try:
        content = read_json(file)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def _rename_references(runs: Iterable[Run]) -> None:
    """Replaces old run names in the references recorded in manifests."""
    manifests: dict[Run, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for run in runs:
        with suppress(InputError):
            manifest = run.manifest
            origin = manifest.get("migrated_from") if isinstance(manifest, dict) else None
            if isinstance(origin, dict) and manifest.get("run") == run.name:
                manifests[run] = manifest
                names[str(origin.get("run"))] = run.name
    for run, manifest in manifests.items():
        references = manifest.get("references")
        if not isinstance(references, dict):
            continue
        renamed = {
            label: {**reference, "name": names[str(reference["name"])]}
            for label, reference in references.items()
            if isinstance(reference, dict) and str(reference.get("name")) in names
        }
        if renamed:
            content = {**manifest, "references": {**references, **renamed}}
            write_json(run.folder / "manifest.json", content, sealed=True)


def _lock(run: Run, stack: ExitStack) -> None:
    """Locks a run until the stack is closed."""
    try:
        stack.enter_context(run.lock(wait=False))
    except LockedError as error:
        raise _NotMigratedError(f"locked by {run.lock_holder}; wait for it to finish") from error


def _upgraded(run: Run, losses: Collection[str]) -> dict[str, Any]:
    """The manifest in the current format; unchanged if it already is."""
    try:
        manifest = run.manifest
    except InputError as error:
        raise _NotMigratedError(str(error)) from error
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    if not isinstance(identity, dict):
        raise _NotMigratedError("its manifest.json has no identity")
    stem, _, suffix = run.name.rpartition("-")
    if "format" in identity:
        name = f"{stem}-{hash_json(identity, 8)}"
        if manifest.get("run") != name or (name != run.name and not _is_half_migrated(run, manifest)):
            raise _NotMigratedError("its manifest.json belongs to another folder")
        return manifest
    if identity.get("version") not in _OLD_VERSIONS or hash_json(identity, 8) != suffix:
        raise _NotMigratedError("its manifest.json belongs to another folder, or to an unknown version of LossLens")
    if not all(isinstance(identity.get(name), dict) for name in ("method", "optim", "lora")):
        raise _NotMigratedError("the identity in its manifest.json is not in a known format")
    loss = _loss(identity["method"], losses)
    try:
        upgraded = _identity(identity, loss, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise _NotMigratedError("its manifest.json lacks fields of the identity") from error
    return {
        **manifest,
        "run": f"{stem}-{hash_json(upgraded, 8)}",
        "options": loss.options,
        "identity": upgraded,
        "migrated_from": {"run": run.name, "identity": identity},
    }


def _is_half_migrated(run: Run, manifest: Mapping[str, Any]) -> bool:
    """True if a migration was interrupted between writing the manifest and renaming the folder."""
    origin = manifest.get("migrated_from")
    if not isinstance(origin, dict) or origin.get("run") != run.name:
        return False
    return hash_json(origin.get("identity"), 8) == run.name.rpartition("-")[2]


def _identity(before: Mapping[str, Any], loss: Loss, manifest: Mapping[str, Any]) -> dict[str, Any]:
    after = {name: value for name, value in before.items() if name != "version"}
    train_on = loss.learns_from(manifest["config"]["train_on"])
    after |= {
        "format": FORMAT,
        "method": loss.identity,
        "optim": {"version": OPTIMISER, **before["optim"]},
        "train_on": TRAIN_ON.values.get(train_on, train_on),
    }
    if before["version"] < 3:
        # Trained on re-tokenised text, which no current configuration describes.
        after["tokens"] = "of the text"
        if before["lora"].get("dropout"):
            facts = manifest.get("training") or {}
            after |= {name: facts.get(name) for name in ("micro_batch", "processes")}
    return after


def _loss(section: Mapping[str, Any], losses: Collection[str]) -> Loss:
    """The loss of a recorded configuration; only built-in classes and those in `losses` are imported."""
    options = dict(section)
    target, name = str(options.pop("_target_", "")), str(options.get("name"))
    builtin = builtin_losses().get(name)
    if target.startswith(_OLD_BUILTIN_PREFIX) and builtin is not None:
        kind: Any = builtin
    elif target in losses:
        kind = _own_class(target)
        if builtin is not None and kind is not builtin:
            raise _NotMigratedError(f"its loss {target} has the name of the built-in loss {name}")
    else:
        raise _NotMigratedError(f"its loss {target or '(not named)'} must be allowed with losses={target}")
    try:
        loss: Loss = kind(**in_current_words(kind, options))
    except (ValidationError, TypeError) as error:
        raise _NotMigratedError(f"its loss {target} no longer accepts these options: {_describe(error)}") from error
    return loss


def _own_class(path: str) -> type[Loss]:
    """Imports a loss that the command line allows.

    Raises:
        InputError: There is none at that Python path.
    """
    try:
        kind = pydoc.locate(path)
    except pydoc.ErrorDuringImport as error:
        raise InputError(f"losses={path}: {first_line(error)}") from error
    if not (isinstance(kind, type) and issubclass(kind, Loss)):
        raise InputError(f"losses={path}: not a subclass of losslens.losses.Loss")
    return kind


def _describe(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return first_line(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def sweeps_of(output_dir: Path) -> Iterator[str]:
    """Yields the names of the folders that hold runs.

    Raises:
        InputError: `output_dir` does not exist.
    """
    if not output_dir.is_dir():
        raise InputError(f"output_dir={output_dir}: no such folder")
    yield from sorted({file.parents[1].name for file in output_dir.glob("*/*/status.json")})
