"""Gathers the compared adapters of sweeps and elsewhere, and checks that they can be compared."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from losslens.analysis.cohort import (
    Base,
    BaseFolder,
    Cohort,
    ComparedAdapter,
    Diverged,
    SweepContents,
    Unfinished,
    common_modules,
)
from losslens.analysis.manifests import BaseFacts, RunFacts, StartedFacts, read_facts
from losslens.analysis.scores import scores_of_runs
from losslens.core.commands import command_name
from losslens.core.errors import InputError
from losslens.core.hashing import hash_folder, hash_json
from losslens.evaluation.outcomes import model_fingerprint, recorded_model_fingerprint
from losslens.models.adapters import adapter_fingerprint, require_intact_initial
from losslens.runs.integrity import require_recorded_outcomes
from losslens.runs.run import Run, recorded_adapter_fingerprint, runs_of
from losslens.updates.checkpoint import needs_base
from losslens.updates.folder import open_adapter
from losslens.updates.weights import is_checkpoint

_ADAPTER_FILES = ("adapter_model*.safetensors", "adapter_config.json")
_MODEL_FILES = ("model*.safetensors", "model.safetensors.index.json", "config.json")
_ADVICE = "they cannot be compared; put them into different sweeps"


def find_runs(output_dir: Path, sweeps: Sequence[str], across: Literal["rollouts"] | None) -> SweepContents:
    """Finds the runs of `sweeps`, finished or not.

    Args:
        output_dir: The folder of the sweeps.
        sweeps: Their names.
        across: What the runs may differ in.

    Raises:
        InputError: There is no such sweep, a finished run's adapter is not the one that was trained, or two runs cannot
            be compared (base, rollouts, prompts).
    """
    runs = {_name(run, len(sweeps) > 1): run for sweep in sweeps for run in runs_of(output_dir, sweep)}
    left_out = _without_status(output_dir, sweeps)
    finished = {}
    diverged = []
    unfinished = []
    for name, run in runs.items():
        state = run.status["state"]
        if state == "completed":
            finished[name] = run
        elif run.divergence:
            diverged.append(Diverged(name, run, read_facts(run, StartedFacts), run.divergence))
            left_out[name] = run.divergence
        else:
            left_out[name] = f"{state}, not completed"
            # A run that was never started has no manifest, and that of a failed one may be from another version.
            with contextlib.suppress(InputError):
                unfinished.append(Unfinished(name, read_facts(run, StartedFacts), str(state)))
    bases = [
        Base(name, run, read_facts(run, BaseFacts)) for name, run in finished.items() if run.name.startswith("base-")
    ]
    trained = {name: run for name, run in finished.items() if not run.name.startswith("base-")}
    not_yet = len(left_out) - len(diverged)
    why = [f"{not_yet} not completed"] * bool(not_yet) + [f"{len(diverged)} diverged"] * bool(diverged)
    nothing = f"sweep={','.join(sweeps)}: no completed run" + f" ({', '.join(why)})" * bool(why)
    members = [
        _of_run(name, run, output_dir, left_out)
        for name, run in tqdm(trained.items(), desc="gathering", unit="run", leave=False, disable=not trained)
    ]
    _require_comparable([*members, *diverged], bases, across, left_out)
    once = {(run.facts.configuration, run.facts.seeds): run for run in reversed(diverged)}
    if not sweeps:
        nothing = "sweep=null: give adapters={name: folder, …} to compare"
    ended = {
        (facts.configuration, facts.seeds)
        for facts in [*(run.facts for run in members), *(run.facts for run in diverged)]
        if facts
    }
    unfinished = [run for run in unfinished if (run.facts.configuration, run.facts.seeds) not in ended]
    return SweepContents(members, bases, list(reversed(once.values())), {*runs, "base"}, nothing, left_out, unfinished)


def gather_cohort(contents: SweepContents, adapters: Mapping[str, Path], base: BaseFolder | None = None) -> Cohort:
    """Joins the runs of some sweeps and the external `adapters`, after checking that they can be compared.

    Args:
        contents: The runs.
        adapters: Folders of adapters and of whole models, by label.
        base: The base, for those of `adapters` whose updates depend on it.

    Raises:
        InputError: There is nothing to compare; two adapters cannot be compared (modules, shapes or problems differ);
            outcomes belong to another adapter, or are damaged.
    """
    members, bases, left_out = contents.members, contents.bases, contents.left_out
    if not members and not adapters:
        raise InputError(contents.nothing)
    _require_own_outcomes(members, bases, left_out)
    scores = scores_of_runs([*(base.run for base in bases), *(member.run for member in members if member.run)])
    for benchmark in sorted(
        {benchmark for member in members if member.run for benchmark in scores.benchmarks(member.run)}
    ):
        if not bases or benchmark not in scores.benchmarks(bases[0].run):
            left_out[f"comparison with the base on {benchmark}"] = "the base was not scored on it"
    members = _distinct(members, left_out)
    for name, folder in adapters.items():
        if name in contents.taken:
            raise InputError(f"adapters.{name}: the name is already taken by a run or the base")
        members.append(_external(name, folder, base))
    modules, shapes, ranks = _shapes(members, left_out)
    return Cohort(members, modules, shapes, ranks, bases, scores, contents.diverged, left_out, contents.unfinished)


def _external(name: str, folder: Path, base: BaseFolder | None) -> ComparedAdapter:
    """Returns an adapter or a whole model that was trained elsewhere."""
    if not needs_base(folder):
        return ComparedAdapter(name, folder, hash_folder(folder, _ADAPTER_FILES))
    files = hash_folder(folder, _MODEL_FILES if is_checkpoint(folder) else _ADAPTER_FILES)
    # The same weights are another update to another base.
    sha256 = hash_json([files, dict(base.identity) if base else None], 64)
    return ComparedAdapter(name, folder, sha256, base=base.folder if base else None)


def _name(run: Run, several: bool) -> str:
    """Returns the name of a run in the tables: its folder, prefixed by its sweep if there are several.

    Raises:
        InputError: A spreadsheet would read it as a formula.
    """
    if run.name.startswith(("=", "+", "-", "@", "\t", "\r")):
        raise InputError(f"{str(run.folder)!r}: a spreadsheet would read this name as a formula; rename the folder")
    return f"{run.folder.parent.name}/{run.name}" if several else run.name


def _without_status(output_dir: Path, sweeps: Sequence[str]) -> dict[str, str]:
    """Returns folders with an adapter but without a status."""
    missing = {}
    for sweep in sweeps:
        for folder in sorted((output_dir / sweep).iterdir()):
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(f"{folder}: cannot be read")
            if Run(folder).adapter.is_dir() and not (folder / "status.json").exists():
                missing[_name(Run(folder), len(sweeps) > 1)] = "no status.json"
    return missing


def _of_run(name: str, run: Run, output_dir: Path, left_out: dict[str, str]) -> ComparedAdapter:
    facts = read_facts(run, RunFacts)
    if not run.is_trained():
        raise InputError(f"{run.folder}: no finished adapter")
    if run.status.get("adapter_sha256") != facts.adapter_sha256:
        raise InputError(
            f"{run.folder / 'status.json'}: the adapter_sha256 in status.json does not match its adapter; run the same "
            f"{command_name('train.py')} command again to write it anew"
        )
    initial = None
    try:
        if facts.initial_adapter is not None:
            initial = _initial(output_dir / "init" / facts.initial_adapter.folder, facts.initial_adapter.sha256)
    except InputError as error:
        left_out[f"drift of A in {name}"] = str(error)
    return ComparedAdapter(name, run.adapter, recorded_adapter_fingerprint(run), initial, run, facts)


def _initial(folder: Path, sha256: str) -> Path:
    if adapter_fingerprint(folder) != sha256:
        raise InputError(f"{folder}: not the adapter that the run started from")
    require_intact_initial(folder)
    with open_adapter(folder):
        return folder


def _require_comparable(
    runs: Sequence[ComparedAdapter | Diverged],
    bases: Sequence[Base],
    across: Literal["rollouts"] | None,
    left_out: dict[str, str],
) -> None:
    """Rejects runs whose base, frozen rollouts or training prompts differ from those of the first run that has them.

    Frozen rollouts of the same content have the same prompts, so the prompts matter where a run sampled its own.
    """
    trained = [(run.name, run.facts) for run in runs if run.facts]
    compared: dict[str, list[tuple[str, Any]]] = {
        "base": [(name, facts.base) for name, facts in trained],
        "rollouts": [(name, facts.rollouts.sha256) for name, facts in trained if facts.rollouts is not None],
    }
    if any(facts.own_samples for _, facts in trained) and len(trained) > 1:
        compared["prompts"] = [(name, facts.prompts_sha256) for name, facts in trained if facts.prompts_sha256]
        known = {name for name, _ in compared["prompts"]}
        for name in [name for name, _ in trained if name not in known]:
            left_out[f"a check of the training prompts of {name}"] = "its manifest has no hash of them (older version)"
    for what, values in compared.items():
        for name, value in values:
            first_name, other = values[0]
            if value != other and (what == "base" or across is None):
                advice = _ADVICE if what == "base" else f"{_ADVICE}, or allow_different=rollouts"
                raise InputError(f"{name}: different {what} than {first_name}; {advice}")
    for base in bases:
        if trained and base.facts.base != trained[0][1].base:
            raise InputError(f"{base.name}: not the base of {trained[0][0]}; {_ADVICE}")


def _require_own_outcomes(members: Sequence[ComparedAdapter], bases: Sequence[Base], left_out: dict[str, str]) -> None:
    """Rejects outcomes that were changed or deleted, or that belong to another run or snapshot."""
    models = [(base.name, base.run, model_fingerprint(base.facts.base, None)) for base in bases]
    models += [
        (member.name, member.run, model_fingerprint(member.facts.base, member.facts.adapter_sha256))
        for member in members
        if member.run and member.facts
    ]
    for name, run, scored in models:
        if not require_recorded_outcomes(run.folder) and any(run.folder.glob("eval/*.parquet")):
            left_out[f"a check of the outcomes of {name}"] = "its manifest has no hashes of them (older version)"
        for file in sorted(run.folder.glob("eval/*.parquet")):
            if recorded_model_fingerprint(file) != scored:
                raise InputError(f"{file}: not the answers of {name}; delete the file and score the run again")


def _distinct(members: Sequence[ComparedAdapter], left_out: dict[str, str]) -> list[ComparedAdapter]:
    """Removes duplicates of runs that several sweeps contain, which would count twice in every family of tests.

    Two losses may end in the same adapter, as SFT and RFT do if all rollouts are correct; these remain two runs.
    """
    kept: dict[tuple[Any, ...], ComparedAdapter] = {}
    for member in members:
        facts = member.facts
        same = kept.setdefault((member.sha256, *((facts.configuration, facts.seeds) if facts else ())), member)
        if same is not member:
            left_out[member.name] = f"the same run as {same.name}"
    return list(kept.values())


def _shapes(
    members: Sequence[ComparedAdapter], left_out: dict[str, str]
) -> tuple[list[str], list[tuple[int, int]], dict[str, list[int]]]:
    """Returns the compared modules, their shapes, and for each member their ranks."""
    modules = common_modules(members)
    shapes: dict[str, tuple[int, int]] = {}
    ranks, first = {}, members[0]
    for member in members:
        with member.point.open() as update:
            for module, shape in update.shapes.items():
                if module in modules and shape != shapes.setdefault(module, shape):
                    raise InputError(
                        f"{member.name}: {module} is {_times(shape)}, but {_times(shapes[module])} in {first.name}; "
                        "they cannot be compared"
                    )
            # An interpolation of two snapshots has twice the rank, though both lie in about the same few dimensions.
            most = member.facts.rank if member.facts else None
            ranks[member.name] = [min(update.ranks[module], most or update.ranks[module]) for module in modules]
            others = [module for module in update.modules if module not in modules]
            if others:
                left_out[f"further modules of {member.name}"] = f"no adapter has them: {_listed(others)}"
    return modules, [shapes[module] for module in modules], ranks


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"
