"""Takes runs of an earlier LossLens over: their identities in today's form, their folders under today's names.

Nothing is trained, scored or deleted. Each step is done once or not at all, so that the same call finishes what a
killed one began.
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
from losslens.runs.integrity import bound_to
from losslens.runs.run import LockedError, Run, find_run, runs_of
from losslens.runs.spec import OPTIMISER
from losslens.scheduling.status import run_statuses

# What an identity of before has: 2 until rollouts kept their token ids, 3 since.
_BEFORE = (2, 3)
_OWN = "losslens.methods."


@dataclass(frozen=True)
class Moved:
    """What became of a run.

    Attributes:
        run: Its folder's name as it was.
        name: Its folder's name now.
        left: Why it was left as it was; empty for one that was taken over.
    """

    run: str
    name: str
    left: str = ""


class _LeftError(Exception):
    """Says why a run stays as it is."""


def migrate(output_dir: Path, sweep: str, losses: Collection[str] = ()) -> list[Moved]:
    """Takes the runs of a sweep over.

    Args:
        output_dir: The folder of all sweeps.
        sweep: The sweep.
        losses: Classes of losses outside LossLens, by their Python path: only those are imported.

    Returns:
        The runs that were not in today's form, and what became of each.

    Raises:
        InputError: There is no such sweep, or no such class.
    """
    if Path(sweep).name != sweep:
        raise InputError(f"sweep={sweep}: not the name of a sweep")
    runs = [run for run in runs_of(output_dir, sweep) if not run.name.startswith("base-")]
    moved = []
    for run_status in run_statuses(run for run in runs if (run.folder / "manifest.json").exists()):
        run = run_status.run
        try:
            if run_status.is_live:
                raise _LeftError(f"{run_status.state} on Slurm: let it end, or cancel it (scancel)")
            name = _take_over(run, losses)
        except _LeftError as error:
            moved.append(Moved(run.name, run.name, str(error)))
            continue
        if name != run.name:
            moved.append(Moved(run.name, name))
    _rename_references(runs_of(output_dir, sweep))
    return moved


def _take_over(run: Run, losses: Collection[str]) -> str:
    """Writes what the folder holds in today's form, and renames it then.

    Returns:
        Its name now.
    """
    with ExitStack() as stack:
        _hold(run, stack)
        manifest = _upgraded(run, losses)  # as it is now, that nobody writes it any more
        target = Run(run.folder.with_name(manifest["run"]))
        if target == run:
            return run.name
        _hold(target, stack)
        there = find_run(run.folder.parent, target.name.rpartition("-")[2])
        if there is not None and there != run:
            raise _LeftError(f"it is the same run as {there.name}; keep one of both, and move or delete the other")
        now = bound_to(manifest)
        before = bound_to({**manifest, "identity": manifest["migrated_from"]["identity"]})
        snapshots = [(file, _snapshot(file)) for file in sorted(run.folder.glob("snapshots/step-*/manifest.json"))]
        write_json(run.folder / "manifest.json", manifest)
        for file, snapshot in snapshots:
            if snapshot.get("run") == before:
                write_json(file, {**snapshot, "run": now})
        for checkpoint in sorted(run.folder.glob("checkpoints/checkpoint-*")):
            from losslens.training.callbacks import rewrite_checksums

            rewrite_checksums(checkpoint, before, now)
        run.folder.rename(target.folder)
    run.lock_file.unlink(missing_ok=True)
    return target.name


def _snapshot(file: Path) -> dict[str, Any]:
    """The manifest of a snapshot; empty for a damaged one, which stays as it is."""
    try:
        content = read_json(file)
    except InputError:
        return {}
    return content if isinstance(content, dict) else {}


def _rename_references(runs: Iterable[Run]) -> None:
    """Names the runs that others were compared with while they trained as they are called now."""
    manifests: dict[Run, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for run in runs:
        with suppress(InputError):
            manifest = run.manifest
            before = manifest.get("migrated_from") if isinstance(manifest, dict) else None
            if isinstance(before, dict) and manifest.get("run") == run.name:
                manifests[run] = manifest
                names[str(before.get("run"))] = run.name
    for run, manifest in manifests.items():
        references = manifest.get("references")
        if not isinstance(references, dict):
            continue
        stale = {
            label: {**each, "name": names[str(each["name"])]}
            for label, each in references.items()
            if isinstance(each, dict) and str(each.get("name")) in names
        }
        if stale:
            write_json(run.folder / "manifest.json", {**manifest, "references": {**references, **stale}})


def _hold(run: Run, stack: ExitStack) -> None:
    """Holds a run until the stack ends."""
    try:
        stack.enter_context(run.lock(wait=False))
    except LockedError as error:
        raise _LeftError(f"{run.lock_holder} is at it: let it end") from error


def _upgraded(run: Run, losses: Collection[str]) -> dict[str, Any]:
    """The manifest in today's form; of a run that has it, as it is."""
    try:
        manifest = run.manifest
    except InputError as error:
        raise _LeftError(str(error)) from error
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    if not isinstance(identity, dict):
        raise _LeftError("no identity in its manifest.json")
    stem, _, suffix = run.name.rpartition("-")
    if "format" in identity:
        name = f"{stem}-{hash_json(identity, 8)}"
        if manifest.get("run") != name or (name != run.name and not _was_begun(run, manifest)):
            raise _LeftError("its manifest.json is not of this folder")
        return manifest
    if identity.get("version") not in _BEFORE or hash_json(identity, 8) != suffix:
        raise _LeftError("its manifest.json is not of this folder, or of an unknown LossLens")
    if not all(isinstance(identity.get(name), dict) for name in ("method", "optim", "lora")):
        raise _LeftError("its identity is not one of an earlier LossLens")
    loss = _loss(identity["method"], losses)
    try:
        upgraded = _identity(identity, loss, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise _LeftError("its manifest.json lacks what decides a run") from error
    return {
        **manifest,
        "run": f"{stem}-{hash_json(upgraded, 8)}",
        "options": loss.options,
        "identity": upgraded,
        "migrated_from": {"run": run.name, "identity": identity},
    }


def _was_begun(run: Run, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest in today's form was written by a migration that did not come to the folder's name."""
    before = manifest.get("migrated_from")
    if not isinstance(before, dict) or before.get("run") != run.name:
        return False
    return hash_json(before.get("identity"), 8) == run.name.rpartition("-")[2]


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
        # Trained on what its text was tokenised to: no configuration of today means that.
        after["tokens"] = "of the text"
        if before["lora"].get("dropout"):
            facts = manifest.get("training") or {}
            after |= {name: facts.get(name) for name in ("micro_batch", "processes")}
    return after


def _loss(section: Mapping[str, Any], losses: Collection[str]) -> Loss:
    """The loss of a recorded configuration; no class is imported but LossLens's own and those in `losses`."""
    options = dict(section)
    target, name = str(options.pop("_target_", "")), str(options.get("name"))
    own = builtin_losses().get(name)
    if target.startswith(_OWN) and own is not None:
        kind: Any = own
    elif target in losses:
        try:
            kind = pydoc.locate(target)
        except pydoc.ErrorDuringImport as error:
            raise InputError(f"losses={target}: {first_line(error)}") from error
        if not (isinstance(kind, type) and issubclass(kind, Loss)):
            raise InputError(f"losses={target}: no class that is a losslens.losses.Loss")
        if own is not None and kind is not own:
            raise _LeftError(f"its loss {target} has the name of LossLens's own {name}")
    else:
        raise _LeftError(f"its loss is {target or 'not named'}; to take it over too: losses={target}")
    try:
        return kind(**in_current_words(kind, options))
    except (ValidationError, TypeError) as error:
        raise _LeftError(f"its loss {target} does not take these options any more: {_field(error)}") from error


def _field(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return first_line(error)
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def sweeps_of(output_dir: Path) -> Iterator[str]:
    """Names of the folders that hold runs.

    Raises:
        InputError: There is no such folder.
    """
    if not output_dir.is_dir():
        raise InputError(f"output_dir={output_dir}: no such folder")
    yield from sorted({file.parents[1].name for file in output_dir.glob("*/*/status.json")})
