"""Takes runs of an earlier LossLens over: their identities in today's form, their folders under today's names.

Nothing is trained, scored or deleted. Each step is done once or not at all, so that the same call finishes what a
killed one began.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import get_class
from pydantic import ValidationError

from losslens.errors import InputError, first_line
from losslens.files import digest, read_json, write_json
from losslens.identity import FORMAT
from losslens.integrity import bound_to
from losslens.methods import Method, own_methods
from losslens.runs import HeldError, Run, runs_of
from losslens.spec import OPTIMISER

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
        The runs that are not in today's form, and what became of each.

    Raises:
        InputError: There is no such sweep, or a process is at one of the runs.
    """
    runs = [run for run in runs_of(output_dir, sweep) if not run.name.startswith("base-")]
    todo: dict[Run, dict[str, Any]] = {}
    names: dict[str, str] = {}
    moved = []
    for run in runs:
        if not (run.folder / "manifest.json").exists():
            _require_off_slurm(run)
            continue  # nothing was trained, and the same train.py command begins it anew
        try:
            manifest = _upgraded(run, losses)
        except _LeftError as error:
            moved.append(Moved(run.name, run.name, str(error)))
            continue
        if "migrated_from" in manifest:
            names[manifest["migrated_from"]["run"]] = manifest["run"]
            if manifest["run"] != run.name:
                todo[run] = manifest
    with ExitStack() as stack:
        for run in todo:
            _require_at_rest(run, stack)
        for run, manifest in todo.items():
            target = run.folder.with_name(names[run.name])
            if target.exists():
                moved.append(Moved(run.name, run.name, f"{target.name} is there already"))
                continue
            _take_over(run, manifest, names)
            run.folder.rename(target)
            moved.append(Moved(run.name, target.name))
    for run in todo:
        run.lock_file.unlink(missing_ok=True)
    return moved


def _take_over(run: Run, manifest: dict[str, Any], names: Mapping[str, str]) -> None:
    """Writes what the folder holds in today's form, before it gets its new name."""
    for reference in manifest.get("references", {}).values():
        reference["name"] = names.get(reference["name"], reference["name"])
    write_json(run.folder / "manifest.json", manifest)
    now = bound_to(manifest)
    before = bound_to({**manifest, "identity": manifest["migrated_from"]["identity"]})
    for file in run.folder.glob("snapshots/step-*/manifest.json"):
        snapshot = read_json(file)
        if isinstance(snapshot, dict) and snapshot.get("run") == before:
            write_json(file, {**snapshot, "run": now})
    for checkpoint in run.folder.glob("checkpoints/checkpoint-*"):
        from losslens.training.callbacks import seal_anew

        seal_anew(checkpoint, before, now)


def _require_at_rest(run: Run, stack: ExitStack) -> None:
    """Holds a run until the stack ends.

    Raises:
        InputError: A process is at it, or Slurm has it.
    """
    _require_off_slurm(run)
    try:
        stack.enter_context(run.lock(wait=False))
    except HeldError as error:
        raise InputError(f"{run.name}: {run.holder} is at it; let it end, and do this again") from error


def _require_off_slurm(run: Run) -> None:
    state = run.status
    if state.get("state") == "queued" or (state.get("state") in ("running", "preempted") and "slurm" in state):
        raise InputError(
            f"{run.name}: {state['state']} on Slurm; let it end, or cancel it (scancel), and do this again"
        )


def _upgraded(run: Run, losses: Collection[str]) -> dict[str, Any]:
    """The manifest in today's form; of a run that has it, as it is."""
    manifest = run.manifest
    identity = manifest.get("identity") if isinstance(manifest, dict) else None
    if not isinstance(identity, dict):
        raise _LeftError("no identity in its manifest.json")
    if "format" in identity:
        return manifest
    if identity.get("version") not in _BEFORE or digest(identity, 8) != run.name.rpartition("-")[2]:
        raise _LeftError("its manifest.json is not of this folder, or of an unknown LossLens")
    loss = _loss(identity["method"], losses)
    upgraded = _identity(identity, loss, manifest)
    name = f"{run.name.rpartition('-')[0]}-{digest(upgraded, 8)}"
    return {
        **manifest,
        "run": name,
        "options": loss.model_dump(mode="json", exclude={"name"}),
        "identity": upgraded,
        "migrated_from": {"run": run.name, "identity": identity},
    }


def _identity(before: Mapping[str, Any], loss: Method, manifest: Mapping[str, Any]) -> dict[str, Any]:
    after = {name: value for name, value in before.items() if name != "version"}
    after |= {
        "format": FORMAT,
        "method": loss.identity,
        "optim": {"version": OPTIMISER, **before["optim"]},
    }
    if before["version"] < 3:
        # Trained on what its text was tokenised to: no configuration of today means that.
        after["tokens"] = "of the text"
        if before["lora"].get("dropout"):
            facts = manifest.get("training", {})
            after |= {name: facts.get(name) for name in ("micro_batch", "processes")}
    return after


def _loss(section: Mapping[str, Any], losses: Collection[str]) -> Method:
    """The loss of a recorded configuration; no class is imported but LossLens's own and those in `losses`."""
    options = dict(section)
    target = str(options.pop("_target_", ""))
    own = own_methods().get(str(options.get("name")))
    if target.startswith(_OWN) and own is not None:
        kind: type[Method] = own
    elif target in losses:
        kind = get_class(target)
        if own is not None and kind is not own:
            raise _LeftError(f"its loss {target} has the name of LossLens's own {options['name']}")
    else:
        raise _LeftError(f"its loss is {target}; to take it over too: losses={target}")
    try:
        return kind(**options)
    except (ValidationError, TypeError) as error:
        raise _LeftError(f"its loss {target} does not take these options any more: {first_line(error)}") from error


def sweeps_of(output_dir: Path) -> Iterator[str]:
    """Names of the folders that hold runs.

    Raises:
        InputError: There is no such folder.
    """
    if not output_dir.is_dir():
        raise InputError(f"output_dir={output_dir}: no such folder")
    yield from sorted({file.parents[1].name for file in output_dir.glob("*/*/status.json")})
