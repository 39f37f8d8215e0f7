"""Trajectories of the runs: norm, and cosine to the run's own end and to SFT's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from losslens.analysis.arms import Arm
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import ComparedAdapter, Diverged
from losslens.analysis.snapshots import trajectory_of
from losslens.core.errors import InputError
from losslens.measures.trajectory import Trajectory, trajectory
from losslens.runs.run import Run, recorded_adapter_fingerprint
from losslens.updates.folder import open_adapter

COLUMNS = (
    "run", "method", "lr", "learning_rate", "settings", "seed", "init_seed",
    "diverged", "step", "norm", "cosine_to_end", "cosine_to_sft",
)  # fmt: skip


def trajectory_table(
    arms: Sequence[Arm],
    sft: Mapping[str, ComparedAdapter],
    modules: Sequence[str],
    cache: Cache,
    left_out: dict[str, str],
) -> pd.DataFrame:
    """Builds the table, one row per run and snapshot, including the end; runs without snapshots have no rows.

    Args:
        arms: The arms, with their runs at their ends.
        sft: For each run, the SFT run it is compared with, if any.
        modules: Names of the adapted modules.
        cache: Cached results.
        left_out: Receives the runs with a damaged snapshot, with the reason.
    """
    rows: list[dict[str, Any]] = []
    for arm in tqdm(arms, desc="trajectories", unit="arm", leave=False):
        for run in (*arm.members, *arm.diverged):
            try:
                snapshots = trajectory_of(run)
            except InputError as error:
                left_out[f"trajectory of {run.name}"] = str(error)
                continue
            if len(snapshots) < 2 or not _fits(snapshots, modules):
                continue
            assert run.facts is not None
            targets = [run if isinstance(run, ComparedAdapter) else None, sft.get(run.name)]
            measured = _measured(snapshots, [target for target in targets if target], modules, cache)
            cosines = iter(measured.cosines.T)
            to_end, to_sft = (next(cosines) if target else np.full(len(snapshots), np.nan) for target in targets)
            for number, step in enumerate(snapshots):
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
                        "cosine_to_end": to_end[number],
                        "cosine_to_sft": to_sft[number],
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _fits(snapshots: Mapping[int, Run], modules: Sequence[str]) -> bool:
    """True if a run adapts the same modules as the others, which was not yet checked for diverged runs."""
    with open_adapter(next(iter(snapshots.values())).adapter) as adapter:
        return adapter.modules == list(modules)


def _measured(
    snapshots: Mapping[int, Run], targets: Sequence[ComparedAdapter], modules: Sequence[str], cache: Cache
) -> Trajectory:
    key = [[recorded_adapter_fingerprint(run) for run in snapshots.values()], [target.sha256 for target in targets]]
    names = [field.name for field in fields(Trajectory)]
    known = cache.load("path", key, names)
    if known is None:
        with ExitStack() as stack:
            points = [stack.enter_context(open_adapter(run.adapter)) for run in snapshots.values()]
            ends = [stack.enter_context(open_adapter(target.adapter)) for target in targets]
            known = vars(trajectory(points, ends, modules))
        cache.save("path", key, known)
    return Trajectory(**known)
