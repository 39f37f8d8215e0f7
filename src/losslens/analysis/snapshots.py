"""Which point of every run's way is compared: its end, a step, or the place where the update has a certain norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

from pydantic import ValidationError
from tqdm import tqdm

from losslens.analysis.cohort import ComparedAdapter, Diverged
from losslens.config.evaluation import Evaluation
from losslens.core.errors import InputError, UnavailableError
from losslens.core.files import atomic_folder, read_json, write_json
from losslens.evaluation.score import score_run
from losslens.measures.trajectory import NormCrossing, first_norm_crossing, interpolate, trajectory
from losslens.models.adapters import adapter_hashes
from losslens.runs.recorded import Trust, data_of, model_of
from losslens.runs.run import Run, recorded_adapter_hash
from losslens.updates.folder import open_adapter, write_adapter

At = Literal["end", "norm"] | int


def trajectory_of(member: ComparedAdapter | Diverged) -> dict[int, Run]:
    """The snapshots of a run by step, and its end, if it has one, as the last; none for an adapter made elsewhere.

    Raises:
        InputError: One of them is not as it was written.
    """
    if member.run is None or member.facts is None:
        return {}
    way = member.run.snapshots
    for run in way.values():
        if not run.is_trained():
            raise InputError(f"{run.folder}: no whole snapshot; delete it")
    return {**way, member.facts.training.steps: member.run} if isinstance(member, ComparedAdapter) else way


def at_checkpoint(
    members: Sequence[ComparedAdapter], at: At, norm: float | None, left_out: dict[str, str]
) -> list[ComparedAdapter]:
    """The members at `at`; those that were never there are left out, with the reason.

    Args:
        members: Finished runs, at their ends.
        at: `end`, a step, or `norm`: the first place at which ‖ΔW‖ is `norm`.
        norm: ‖ΔW‖_F; by default the largest that every run reaches.
        left_out: Gets the reasons.

    Raises:
        InputError: No run was there, or a snapshot is not as it was written.
    """
    if at == "end" or not members:
        return list(members)
    found = _at_norm(members, norm, left_out) if at == "norm" else _at_step(members, int(at), left_out)
    if not found:
        raise InputError(f"at={at}: no run was there (see optim.snapshot_steps)")
    return found


def _at_step(members: Sequence[ComparedAdapter], step: int, left_out: dict[str, str]) -> list[ComparedAdapter]:
    found = []
    for member in members:
        way = trajectory_of(member)
        if step in way:
            found.append(_moved_to(member, way[step]))
        else:
            left_out[member.name] = f"no snapshot at step {step}; it has {', '.join(map(str, way))}"
    return found


def _at_norm(members: Sequence[ComparedAdapter], norm: float | None, left_out: dict[str, str]) -> list[ComparedAdapter]:
    ways = {member.name: trajectory_of(member) for member in members}
    measured = {}
    for member in tqdm(members, desc="norms on the way", unit="run", leave=False):
        with ExitStack() as stack:
            points = [stack.enter_context(open_adapter(run.adapter)) for run in ways[member.name].values()]
            measured[member.name] = trajectory(points, [], points[0].modules)
    # A run without a way, or that ends at 0, reaches no norm, and would let no other one reach any.
    reached = [float(measured[name].norms.max()) for name, way in ways.items() if len(way) > 1]
    reached = [norm for norm in reached if norm > 0]
    if not reached:
        raise InputError("checkpoint=norm: no run has snapshots that lead anywhere (see optim.snapshot_steps)")
    wanted = min(reached) if norm is None else norm
    moved, early = [], []
    for member in members:
        way, norms = ways[member.name], measured[member.name].norms
        if len(way) < 2:
            left_out[member.name] = f"checkpoint=norm: no snapshots on its way (it ends at ‖ΔW‖ = {norms[-1]:.4g})"
            continue
        crossing = first_norm_crossing(norms, measured[member.name].to_next, wanted)
        if crossing is None:
            left_out[member.name] = f"it never reaches ‖ΔW‖ = {wanted:.4g} (its largest is {norms.max():.4g})"
            continue
        moved.append(_moved_to(member, _between(member, way, crossing, wanted)))
        if crossing.before < 0:
            early.append(member.name)
    if early:
        left_out["what came before the first snapshot"] = (
            f"‖ΔW‖ = {wanted:.4g} lies before it on the way of {', '.join(early)}: there it stands made smaller"
        )
    return moved


def _between(member: ComparedAdapter, way: Mapping[int, Run], crossing: NormCrossing, norm: float) -> Run:
    """The point of a run's way at `norm`, as a folder beside its snapshots; made unless it is there."""
    assert member.run is not None
    steps = [0, *way]
    runs = [None, *way.values()]
    before, after = runs[crossing.before + 1], runs[crossing.before + 2]
    assert after is not None
    weight = round(crossing.weight, 9)  # another machine's last digit makes no other point
    manifest: dict[str, Any] = {
        "norm": norm, "between_steps": steps[crossing.before + 1 : crossing.before + 3], "weight": weight,
        "of": [recorded_adapter_hash(run) for run in (before, after) if run],
    }  # fmt: skip
    point = Run(member.run.folder / "snapshots" / f"norm-{norm:.6g}")
    with point.lock():  # another analysis may be making it
        if not _is_there(point, manifest):
            with ExitStack() as stack:
                start = stack.enter_context(open_adapter(before.adapter)) if before else None
                adapter = stack.enter_context(open_adapter(after.adapter))
                updates = {m: interpolate(start[m] if start else None, adapter[m], weight) for m in adapter.modules}
            with atomic_folder(point.folder) as temporary:
                write_adapter(temporary / "adapter", updates, read_json(after.adapter / "adapter_config.json"))
                hashes = adapter_hashes(temporary / "adapter")
                write_json(temporary / "manifest.json", {**manifest, "outcomes": {}, **hashes})
    return point


def _is_there(point: Run, manifest: Mapping[str, Any]) -> bool:
    """Whether a point was made of the same snapshots, and is still as it was written."""
    try:
        return manifest.items() <= point.manifest.items() and point.is_trained()
    except InputError:
        return False


def _moved_to(member: ComparedAdapter, point: Run) -> ComparedAdapter:
    if point == member.run:
        return member
    assert member.facts is not None
    facts = member.facts.model_copy(update=adapter_hashes(point.adapter))
    # Where two snapshots are put together, A is two matrices, and how far it drifted is no one angle.
    initial = member.initial if point.folder.name.startswith("step-") else None
    return replace(
        member, adapter=point.adapter, sha256=recorded_adapter_hash(point), initial=initial, run=point, facts=facts
    )


def score_snapshots(
    members: Sequence[ComparedAdapter], model_path: str | None, trust: Trust, left_out: dict[str, str]
) -> None:
    """Scores each moved member as the end of its run was scored, unless that was done before.

    Args:
        members: From `at_checkpoint`.
        model_path: The base, where it is not where the runs found it.
        trust: What the runs' manifests may ask for.
        left_out: Gets the reason where they cannot be scored.
    """
    for member in tqdm(members, desc="scoring", unit="run", leave=False):
        if member.run is None or member.facts is None:
            continue
        config = member.facts.config
        try:
            evaluation = Evaluation.model_validate(config.evaluation)
            benchmarks = [data_of(data.model_dump(), trust) for data in member.facts.scored_on]
            model = model_of(config.model.model_dump(), trust)
        except UnavailableError as error:
            left_out["accuracy"] = str(error)
            return
        except ValidationError:
            left_out["accuracy"] = "the runs are of another version of LossLens"
            return
        if evaluation.engine == "openai":
            left_out["accuracy"] = "the runs were scored by a server, which has only their ends"
            return
        if model_path is not None:
            model = model.model_copy(update={"path": model_path, "revision": None, "package": None})
        try:
            with member.run.lock():
                score_run(member.run, model, benchmarks, evaluation)
        except InputError as error:
            left_out["accuracy"] = str(error)
            return
