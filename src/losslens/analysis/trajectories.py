"""Trajectories of the runs: norm, cosine to the run's own end and to SFT's, and how early their directions settle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from losslens.analysis.arms import Arm, partner
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import ComparedAdapter, Diverged, Point
from losslens.analysis.snapshots import point_of, trajectory_of
from losslens.core.errors import InputError
from losslens.measures.definitions.weight_space import mean
from losslens.measures.tables import RunPath
from losslens.measures.trajectory import LEADING, Trajectory, left_overlaps, trajectory
from losslens.updates.base import Array

COLUMNS = (
    "run", "method", "lr", "learning_rate", "settings", "seed", "init_seed",
    "diverged", "step", "norm", "cosine_to_end", "cosine_to_sft", "overlap_to_end", "overlap_to_repeat",
)  # fmt: skip


@dataclass(frozen=True)
class MeasuredTrajectory:
    """Trajectory of one run, S snapshots with the end; NaN where there is no such target.

    Attributes:
        steps: Training steps of the snapshots.
        norms: ‖ΔW‖_F, shape (S,).
        to_end: Cosine to the run's own end, shape (S,).
        to_sft: Cosine to the end of the SFT run that it is compared with, shape (S,).
        overlap_to_end: Overlap beyond chance of the leading left subspace with that of its own end, shape (S, M).
        overlap_to_repeat: The same with the end of the arm's next run, of another data order and the same initial
            adapter, shape (S, M).
        path: What run measures need.
    """

    steps: list[int]
    norms: Array
    to_end: Array
    to_sft: Array
    overlap_to_end: Array
    overlap_to_repeat: Array
    path: RunPath


def measure_trajectories(
    arms: Sequence[Arm],
    sft: Mapping[str, ComparedAdapter],
    modules: Sequence[str],
    cache: Cache,
    left_out: dict[str, str],
) -> dict[str, MeasuredTrajectory]:
    """Measures the trajectory of each run that has snapshots.

    Args:
        arms: The arms, with their runs at their ends.
        sft: For each run, the SFT run it is compared with, if any.
        modules: Names of the adapted modules.
        cache: Cached results.
        left_out: Receives the runs with a damaged snapshot, with the reason, and unequal snapshots.
    """
    found = {}
    for arm in tqdm(arms, desc="trajectories", unit="arm", leave=False):
        for run in _runs_of(arm):
            try:
                snapshots = trajectory_of(run)
            except InputError as error:
                left_out[f"trajectory of {run.name}"] = str(error)
                continue
            # A single snapshot is the end.
            points = [point_of(run, point) for point in snapshots.values()]
            if len(points) >= 2 and _fits(points[0], modules):
                found[run.name] = _measured_run(run, list(snapshots), points, arm, sft.get(run.name), modules, cache)
    if len({tuple(measured.steps) for measured in found.values()}) > 1:
        left_out["equal snapshots"] = "runs have snapshots at different steps, on which straightness and locking depend"
    return found


def trajectory_table(arms: Sequence[Arm], trajectories: Mapping[str, MeasuredTrajectory]) -> pd.DataFrame:
    """Builds the table, one row per run and snapshot, including the end; runs without snapshots have no rows."""
    rows: list[dict[str, Any]] = []
    for arm in arms:
        for run in _runs_of(arm):
            if run.name not in trajectories:
                continue
            assert run.facts is not None
            measured = trajectories[run.name]
            overlaps = [mean(values) for values in (measured.overlap_to_end, measured.overlap_to_repeat)]
            for number, step in enumerate(measured.steps):
                rows.append(
                    {
                        "run": run.name,
                        "method": arm.method,
                        "lr": arm.lr,
                        "learning_rate": arm.learning_rate,
                        "settings": arm.settings,
                        "seed": run.facts.config.seed,
                        "init_seed": run.facts.config.init_seed,
                        "diverged": isinstance(run, Diverged),
                        "step": step,
                        "norm": measured.norms[number],
                        "cosine_to_end": measured.to_end[number],
                        "cosine_to_sft": measured.to_sft[number],
                        "overlap_to_end": overlaps[0][number],
                        "overlap_to_repeat": overlaps[1][number],
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _runs_of(arm: Arm) -> list[ComparedAdapter | Diverged]:
    return [*arm.members, *arm.diverged]


def _measured_run(
    run: ComparedAdapter | Diverged,
    steps: list[int],
    points: Sequence[Point],
    arm: Arm,
    sft: ComparedAdapter | None,
    modules: Sequence[str],
    cache: Cache,
) -> MeasuredTrajectory:
    end = run if isinstance(run, ComparedAdapter) else None
    again = partner(run, arm)
    again = None if again is None or again.name == run.name else again
    measured = _measured(points, [target.point for target in (end, sft) if target], modules, cache)
    cosines = iter(measured.cosines.T)
    to_end, to_sft = (next(cosines) if target else np.full(len(points), np.nan) for target in (end, sft))
    overlaps = iter(_overlaps(points, [target.point for target in (end, again) if target], modules, cache))
    unknown = np.full((len(points), len(modules)), np.nan)
    overlap_to_end, overlap_to_repeat = (next(overlaps) if target else unknown for target in (end, again))
    half = half_time(steps)
    path = RunPath(measured.steps, unknown[0] if half is None else overlap_to_end[half])
    return MeasuredTrajectory(steps, measured.norms, to_end, to_sft, overlap_to_end, overlap_to_repeat, path)


def half_time(steps: Sequence[int]) -> int | None:
    """Returns the place of the snapshot nearest to half of the steps; None if it is more than a sixth of them away."""
    nearest = min(range(len(steps) - 1), key=lambda n: abs(steps[n] - steps[-1] / 2))
    return nearest if 6 * abs(steps[nearest] - steps[-1] / 2) <= steps[-1] else None


def _overlaps(points: Sequence[Point], targets: Sequence[Point], modules: Sequence[str], cache: Cache) -> Array:
    """Returns `left_overlaps` with each target, shape (targets, S, M)."""
    key = [*_path_key(points, targets, modules), LEADING]
    known = cache.load("overlaps", key, ["overlaps"])
    if known is None:
        with ExitStack() as stack:
            opened, ends = ([stack.enter_context(point.open()) for point in group] for group in (points, targets))
            found = left_overlaps(opened, ends, modules).transpose(1, 0, 2)
        known = cache.save("overlaps", key, {"overlaps": found})
    return known["overlaps"]


def _fits(point: Point, modules: Sequence[str]) -> bool:
    """True if a run changes the modules that are compared, which was not yet checked for diverged runs."""
    with point.open() as update:
        return set(update.modules) >= set(modules) if point.base else update.modules == list(modules)


def _measured(points: Sequence[Point], targets: Sequence[Point], modules: Sequence[str], cache: Cache) -> Trajectory:
    key = _path_key(points, targets, modules)
    names = [field.name for field in fields(Trajectory)]
    known = cache.load("path", key, names)
    if known is None:
        with ExitStack() as stack:
            opened, ends = ([stack.enter_context(point.open()) for point in group] for group in (points, targets))
            found = trajectory(opened, ends, modules)
        known = cache.save("path", key, vars(found))
    return Trajectory(**known)


def _path_key(points: Sequence[Point], targets: Sequence[Point], modules: Sequence[str]) -> list[Any]:
    return [[point.key(modules) for point in points], [target.key(modules) for target in targets]]
