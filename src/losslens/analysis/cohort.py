"""Who is compared: finished runs, adapters made elsewhere, and what forbids to compare them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from losslens.analysis.manifests import BaseFacts, RunFacts, StartedFacts, read_facts
from losslens.analysis.scores import Scores, scores_of_runs
from losslens.core.errors import InputError
from losslens.core.hashing import hash_folder
from losslens.evaluation.outcomes import model_fingerprint, recorded_model_fingerprint
from losslens.models.adapters import adapter_fingerprint
from losslens.runs.integrity import require_recorded_outcomes
from losslens.runs.run import Run, recorded_adapter_hash, runs_of
from losslens.updates.folder import open_adapter

_ADVICE = "they do not compare; put them into different sweeps"


@dataclass(frozen=True)
class Base:
    """The untrained base, as a sweep scored it."""

    name: str
    run: Run
    facts: BaseFacts


@dataclass(frozen=True)
class ComparedAdapter:
    """One adapter among those compared.

    Attributes:
        name: What it is called in the tables.
        adapter: Its folder.
        sha256: Hash of its weights and its configuration.
        initial: Folder of the adapter it started from, where that is known and still there.
        run: The run that made it; None for one made elsewhere.
        facts: The run's manifest; None for one made elsewhere.
    """

    name: str
    adapter: Path
    sha256: str
    initial: Path | None = None
    run: Run | None = None
    facts: RunFacts | None = None


@dataclass(frozen=True)
class Diverged:
    """A run without an end.

    Attributes:
        name: What it is called in the tables.
        run: Its folder.
        facts: Its manifest.
        reason: What was no longer finite, and when.
    """

    name: str
    run: Run
    facts: StartedFacts
    reason: str


@dataclass(frozen=True)
class Cohort:
    """All that an analysis compares.

    Attributes:
        members: The adapters, in the order of the tables.
        modules: Names of the adapted modules, the same in all.
        shapes: (out, in) of each module.
        ranks: Of each member the ranks of its modules.
        bases: The untrained base, once a sweep.
        scores: The outcomes of all of them.
        diverged: Runs that have nothing to compare: they stand in the tables, and in no average.
        left_out: What is not compared, and why.
    """

    members: list[ComparedAdapter]
    modules: list[str]
    shapes: list[tuple[int, int]]
    ranks: dict[str, list[int]]
    bases: list[Base]
    scores: Scores
    diverged: list[Diverged]
    left_out: dict[str, str]

    @cached_property
    def by_name(self) -> dict[str, ComparedAdapter]:
        """The members by name."""
        return {member.name: member for member in self.members}

    @property
    def names(self) -> list[str]:
        """Names of the members."""
        return [member.name for member in self.members]

    @property
    def first(self) -> RunFacts | None:
        """The manifest of the first run: base, rollouts and problems are those of all. None when there are no runs."""
        return next((member.facts for member in self.members if member.facts), None)

    @property
    def base_name(self) -> str:
        """What the untrained base is called in the tables."""
        return self.bases[0].name if self.bases else "base"


@dataclass
class SweepContents:
    """What lies in the folders of some sweeps.

    Attributes:
        members: The finished runs.
        bases: The untrained base, once a sweep.
        diverged: Runs that diverged.
        taken: Names that no adapter made elsewhere may have.
        nothing: What is wrong where there is no member, nor an adapter made elsewhere.
        left_out: What is not compared, and why.
    """

    members: list[ComparedAdapter]
    bases: list[Base]
    diverged: list[Diverged]
    taken: set[str]
    nothing: str
    left_out: dict[str, str]


def find_runs(output_dir: Path, sweeps: Sequence[str], across: Literal["rollouts"] | None) -> SweepContents:
    """The runs of `sweeps`, those that are finished and those that are not.

    Args:
        output_dir: Where the sweeps lie.
        sweeps: Their names.
        across: What the runs may differ in.

    Raises:
        InputError: There is no such sweep, a finished run's adapter is not the one that was trained, or two runs do not
            compare (base, rollouts).
    """
    runs = {_name(run, len(sweeps) > 1): run for sweep in sweeps for run in runs_of(output_dir, sweep)}
    left_out = _without_status(output_dir, sweeps)
    finished = {}
    diverged = []
    for name, run in runs.items():
        state = run.status["state"]
        if state == "completed":
            finished[name] = run
        elif run.divergence:
            diverged.append(Diverged(name, run, read_facts(run, StartedFacts), run.divergence))
            left_out[name] = run.divergence
        else:
            left_out[name] = f"{state}, not completed"
    bases = [
        Base(name, run, read_facts(run, BaseFacts)) for name, run in finished.items() if run.name.startswith("base-")
    ]
    trained = {name: run for name, run in finished.items() if not run.name.startswith("base-")}
    not_yet = len(left_out) - len(diverged)
    why = [f"{not_yet} are not"] * bool(not_yet) + [f"{len(diverged)} diverged"] * bool(diverged)
    nothing = f"sweep={','.join(sweeps)}: no run is completed" + f" ({', '.join(why)})" * bool(why)
    members = [
        _of_run(name, run, output_dir, left_out)
        for name, run in tqdm(trained.items(), desc="gathering", unit="run", leave=False, disable=not trained)
    ]
    _require_comparable([*members, *diverged], bases, across)
    once = {(run.facts.configuration, run.facts.seeds): run for run in reversed(diverged)}
    if not sweeps:
        nothing = "sweep=null: name adapters={name: folder, …} to compare"
    return SweepContents(members, bases, list(reversed(once.values())), {*runs, "base"}, nothing, left_out)


def gather_cohort(found: SweepContents, adapters: Mapping[str, Path]) -> Cohort:
    """The runs that were found and the folders in `adapters`, once it is sure that they compare.

    Raises:
        InputError: There is nothing to compare; two things do not compare (modules, shapes, problems differ); outcomes
            are not of what they stand beside, or are damaged.
    """
    members, bases, left_out = found.members, found.bases, found.left_out
    if not members and not adapters:
        raise InputError(found.nothing)
    _require_own_outcomes(members, bases, left_out)
    scores = scores_of_runs([*(base.run for base in bases), *(member.run for member in members if member.run)])
    for benchmark in sorted(
        {benchmark for member in members if member.run for benchmark in scores.benchmarks(member.run)}
    ):
        if not bases or benchmark not in scores.benchmarks(bases[0].run):
            left_out[f"comparison with the base on {benchmark}"] = "the base was not scored on it"
    members = _distinct(members, left_out)
    for name, folder in adapters.items():
        if name in found.taken:
            raise InputError(f"adapters.{name}: a run or the base is called so already")
        sha256 = hash_folder(folder, ("adapter_model*.safetensors", "adapter_config.json"))
        members.append(ComparedAdapter(name, folder, sha256))
    modules, shapes, ranks = _shapes(members)
    return Cohort(members, modules, shapes, ranks, bases, scores, found.diverged, left_out)


def _name(run: Run, several: bool) -> str:
    """What a run is called in the tables: its folder, after its sweep's name when there are several sweeps."""
    return f"{run.folder.parent.name}/{run.name}" if several else run.name


def _without_status(output_dir: Path, sweeps: Sequence[str]) -> dict[str, str]:
    """Folders that would be runs if they had a status."""
    missing = {}
    for sweep in sweeps:
        for folder in sorted((output_dir / sweep).iterdir()):
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(f"{folder}: cannot be read")
            if (folder / "adapter").is_dir() and not (folder / "status.json").exists():
                missing[_name(Run(folder), len(sweeps) > 1)] = "no status.json in it"
    return missing


def _of_run(name: str, run: Run, output_dir: Path, left_out: dict[str, str]) -> ComparedAdapter:
    facts = read_facts(run, RunFacts)
    if not run.is_trained():
        raise InputError(f"{run.folder}: no finished adapter in it")
    if run.status.get("adapter_sha256") != facts.adapter_sha256:
        raise InputError(f"{run.folder}: the adapter_sha256 in status.json is not that of its adapter")
    initial = None
    try:
        initial = _initial(output_dir / "init" / facts.initial_adapter.folder, facts.initial_adapter.sha256)
    except InputError as error:
        left_out[f"drift of A in {name}"] = str(error)
    return ComparedAdapter(name, run.adapter, recorded_adapter_hash(run), initial, run, facts)


def _initial(folder: Path, sha256: str) -> Path:
    if adapter_fingerprint(folder) != sha256:
        raise InputError(f"{folder}: not the adapter that the run started from")
    with open_adapter(folder):
        return folder


def _require_comparable(
    runs: Sequence[ComparedAdapter | Diverged], bases: Sequence[Base], across: Literal["rollouts"] | None
) -> None:
    """Refuses runs of another base or other rollouts than the first one's."""
    trained = [(run.name, run.facts) for run in runs if run.facts]
    for name, facts in trained:
        first_name, first = trained[0]
        for what, value, other in (
            ("base", facts.base, first.base),
            ("rollouts", facts.rollouts.sha256, first.rollouts.sha256),
        ):
            if value != other and what != across:
                advice = f"{_ADVICE}, or allow_different=rollouts" if what == "rollouts" else _ADVICE
                raise InputError(f"{name}: another {what} than {first_name}; {advice}")
    for base in bases:
        if trained and base.facts.base != trained[0][1].base:
            raise InputError(f"{base.name}: not the base of {trained[0][0]}; {_ADVICE}")


def _require_own_outcomes(members: Sequence[ComparedAdapter], bases: Sequence[Base], left_out: dict[str, str]) -> None:
    """Refuses outcomes that were changed, are gone, or are not of the run, or the point on its way, where they lie."""
    everyone = [(base.name, base.run, model_fingerprint(base.facts.base, None)) for base in bases]
    everyone += [
        (member.name, member.run, model_fingerprint(member.facts.base, member.facts.adapter_sha256))
        for member in members
        if member.run and member.facts
    ]
    for name, run, scored in everyone:
        if not require_recorded_outcomes(run.folder) and any(run.folder.glob("eval/*.parquet")):
            left_out[f"a check of the outcomes of {name}"] = "its manifest is from before their hashes were kept"
        for file in sorted(run.folder.glob("eval/*.parquet")):
            if recorded_model_fingerprint(file) != scored:
                raise InputError(f"{file}: not the answers of {name}; delete it, and the same command scores it again")


def _distinct(members: Sequence[ComparedAdapter], left_out: dict[str, str]) -> list[ComparedAdapter]:
    """Each run once, though several sweeps may hold it: twice it would count twice in every family of tests.

    Two losses may well end in one adapter, as SFT and RFT do where all rollouts are right: those are two runs.
    """
    kept: dict[tuple[Any, ...], ComparedAdapter] = {}
    for member in members:
        facts = member.facts
        same = kept.setdefault((member.sha256, *((facts.configuration, facts.seeds) if facts else ())), member)
        if same is not member:
            left_out[member.name] = f"the same run as {same.name}"
    return list(kept.values())


def _shapes(members: Sequence[ComparedAdapter]) -> tuple[list[str], list[tuple[int, int]], dict[str, list[int]]]:
    """The adapted modules, their shapes, and of each member their ranks."""
    first = members[0]
    ranks = {}
    shapes: dict[str, tuple[int, int]] = {}
    for member in members:
        with open_adapter(member.adapter) as adapter:
            shapes = shapes or adapter.shapes
            for module in sorted(shapes.keys() ^ adapter.shapes.keys()):
                raise InputError(
                    f"{member.name}: other modules are adapted than in {first.name} (one of them has {module}, the "
                    "other has not); they do not compare"
                )
            for module, shape in adapter.shapes.items():
                if shape != shapes[module]:
                    raise InputError(
                        f"{member.name}: {module} is {_times(shape)}, in {first.name} it is {_times(shapes[module])}; "
                        "they do not compare"
                    )
            # Two snapshots put together have twice the rank, though both lie in about the same few dimensions.
            most = member.facts.config.lora_rank.r if member.facts else None
            ranks[member.name] = [min(rank, most or rank) for rank in adapter.ranks.values()]
    return list(shapes), list(shapes.values()), ranks


def _times(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"
