"""Selects the point of training at which runs are compared: the end, a step, or a given norm of the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from tqdm import tqdm

from losslens.analysis.cohort import ComparedAdapter, Diverged, Point, common_modules
from losslens.config.evaluation import Evaluation
from losslens.core.errors import InputError, UnavailableError
from losslens.core.files import atomic_folder, read_json, write_json
from losslens.evaluation.score import score_run
from losslens.measures.trajectory import NormCrossing, first_norm_crossing, interpolate, trajectory
from losslens.models.full_model import write_model_between
from losslens.models.trained_weights import weights_hashes
from losslens.runs.recorded import Trust, data_of, model_of
from losslens.runs.run import Run, recorded_adapter_fingerprint
from losslens.updates.folder import open_adapter, write_adapter

At = Literal["end", "norm"] | int


def trajectory_of(member: ComparedAdapter | Diverged) -> dict[int, Run]:
    """Returns the snapshots of a run by step, with its end (if any) last; empty for an external adapter.

    Raises:
        InputError: A snapshot is damaged.
    """
    if member.run is None or member.facts is None:
        return {}
    snapshots = member.run.snapshots
    for run in snapshots.values():
        if not run.is_trained():
            raise InputError(f"{run.folder}: damaged snapshot; delete it")
    return {**snapshots, member.facts.training.steps: member.run} if isinstance(member, ComparedAdapter) else snapshots


def point_of(member: ComparedAdapter | Diverged, run: Run) -> Point:
    """Returns the weights of one of a member's snapshots, or of its end."""
    return Point(run.adapter, recorded_adapter_fingerprint(run), member.base)


def at_checkpoint(
    members: Sequence[ComparedAdapter], at: At, norm: float | None, left_out: dict[str, str]
) -> list[ComparedAdapter]:
    """Moves the members to a point of training; those that never reach it are left out, with the reason.

    Args:
        members: Finished runs, at their ends.
        at: `end`, a step, or `norm`: the first point at which ‖ΔW‖ is `norm`.
        norm: ‖ΔW‖_F; by default the largest norm that every run reaches.
        left_out: Receives the reasons.

    Raises:
        InputError: No run reaches the point, or a snapshot is damaged.
    """
    if at == "end" or not members:
        return list(members)
    moved = _at_norm(members, norm, left_out) if at == "norm" else _at_step(members, int(at), left_out)
    if not moved:
        raise InputError(f"checkpoint={at}: no run has a snapshot there (see optim.snapshot_steps)")
    return moved


def _at_step(members: Sequence[ComparedAdapter], step: int, left_out: dict[str, str]) -> list[ComparedAdapter]:
    moved = []
    for member in members:
        snapshots = trajectory_of(member)
        if step in snapshots:
            moved.append(_moved_to(member, snapshots[step]))
        else:
            left_out[member.name] = f"no snapshot at step {step}, only at {', '.join(map(str, snapshots))}"
    return moved


def _at_norm(members: Sequence[ComparedAdapter], norm: float | None, left_out: dict[str, str]) -> list[ComparedAdapter]:
    trajectories = {member.name: trajectory_of(member) for member in members}
    measured, modules = {}, common_modules(members)
    for member in tqdm(members, desc="norms of snapshots", unit="run", leave=False):
        with ExitStack() as stack:
            points = [point_of(member, run) for run in trajectories[member.name].values()]
            opened = [stack.enter_context(point.open()) for point in points]
            measured[member.name] = trajectory(opened, [], modules)
    # Runs without snapshots or with a zero update reach no norm; they must not lower the common one to 0.
    reached = [float(measured[name].norms.max()) for name, snapshots in trajectories.items() if len(snapshots) > 1]
    reached = [norm for norm in reached if norm > 0]
    if not reached:
        raise InputError("checkpoint=norm: no run has snapshots with a non-zero update (see optim.snapshot_steps)")
    target = min(reached) if norm is None else norm
    moved, early = [], []
    for member in members:
        snapshots, norms = trajectories[member.name], measured[member.name].norms
        if len(snapshots) < 2:
            left_out[member.name] = f"checkpoint=norm: it has no snapshots (it ends at ‖ΔW‖ = {norms[-1]:.4g})"
            continue
        crossing = first_norm_crossing(norms, measured[member.name].to_next, target)
        if crossing is None:
            left_out[member.name] = f"it never reaches ‖ΔW‖ = {target:.4g} (its largest norm is {norms.max():.4g})"
            continue
        moved.append(_moved_to(member, _between(member, snapshots, crossing, target)))
        if crossing.before < 0:
            early.append(member.name)
    if early:
        left_out["what came before the first snapshot"] = (
            f"{', '.join(early)} reached ‖ΔW‖ = {target:.4g} before its first snapshot; that snapshot is scaled down"
        )
    return moved


def _between(member: ComparedAdapter, snapshots: Mapping[int, Run], crossing: NormCrossing, norm: float) -> Run:
    """Returns the interpolated point at `norm` as a folder next to the snapshots; writes it unless it exists."""
    assert member.run is not None
    steps = [0, *snapshots]
    runs = [None, *snapshots.values()]
    before, after = runs[crossing.before + 1], runs[crossing.before + 2]
    assert after is not None
    weight = round(crossing.weight, 9)  # rounding differences between machines must not make a new point
    manifest: dict[str, Any] = {
        "norm": norm, "between_steps": steps[crossing.before + 1 : crossing.before + 3], "weight": weight,
        "of": [recorded_adapter_fingerprint(run) for run in (before, after) if run],
    }  # fmt: skip
    point = Run(member.run.folder / "snapshots" / f"norm-{norm:.6g}")
    with point.lock():  # another analysis may be writing it
        if not _exists(point, manifest):
            with atomic_folder(point.folder) as temporary:
                folder = temporary / after.adapter.name
                if member.base is None:
                    _write_adapter_between(folder, before.adapter if before else None, after.adapter, weight)
                else:
                    write_model_between(folder, before.adapter if before else member.base, after.adapter, weight)
                content = {**manifest, "outcomes": {}, **weights_hashes(folder)}
                write_json(temporary / "manifest.json", content, sealed=True)
    return point


def _write_adapter_between(folder: Path, before: Path | None, after: Path, weight: float) -> None:
    with ExitStack() as stack:
        start = stack.enter_context(open_adapter(before)) if before else None
        adapter = stack.enter_context(open_adapter(after))
        updates = {m: interpolate(start[m] if start else None, adapter[m], weight) for m in adapter.modules}
    write_adapter(folder, updates, read_json(after / "adapter_config.json"))


def _exists(point: Run, manifest: Mapping[str, Any]) -> bool:
    """True if the point exists intact and was made from the same snapshots."""
    try:
        return manifest.items() <= point.manifest.items() and point.is_trained()
    except InputError:
        return False


def _moved_to(member: ComparedAdapter, point: Run) -> ComparedAdapter:
    if point == member.run:
        return member
    assert member.facts is not None
    facts = member.facts.model_copy(update=weights_hashes(point.adapter))
    # The interpolation of two snapshots has two matrices A, so its drift is undefined.
    initial = member.initial if point.folder.name.startswith("step-") else None
    return replace(
        member,
        adapter=point.adapter,
        sha256=recorded_adapter_fingerprint(point),
        initial=initial,
        run=point,
        facts=facts,
    )


def score_snapshots(
    members: Sequence[ComparedAdapter], model_path: str | None, trust: Trust, left_out: dict[str, str]
) -> None:
    """Scores each member at its snapshot as its final adapter was scored, unless already done.

    Args:
        members: The members from `at_checkpoint`.
        model_path: The base, if it was moved since training.
        trust: What the runs' manifests may request.
        left_out: Receives the reason if they cannot be scored.
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
            left_out["accuracy"] = "the runs were made by another version of LossLens"
            return
        if evaluation.engine != "transformers":
            left_out["accuracy"] = "the runs were scored by a server, which has only their final adapters"
            return
        if model_path is not None:
            model = model.model_copy(update={"path": model_path, "revision": None, "package": None})
        try:
            with member.run.lock():
                score_run(member.run, model, benchmarks, evaluation)
        except InputError as error:
            left_out["accuracy"] = str(error)
            return
