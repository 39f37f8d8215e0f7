"""How each run got where it is: its norm, and its direction against its own end and SFT's."""

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
from losslens.runs.run import Run, recorded_adapter_hash
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
    """One row a run and snapshot, the end included; no row for runs without snapshots.

    Args:
        arms: The runs, at their ends.
        sft: For each run's name the SFT run of its seeds, where there is one.
        modules: Names of the adapted modules.
        cache: Of what was measured before.
        left_out: Gets the runs with a snapshot that is not as it was written, and the reason.
    """
    rows: list[dict[str, Any]] = []
    for arm in tqdm(arms, desc="trajectories", unit="arm", leave=False):
        for run in (*arm.members, *arm.diverged):
            try:
                way = trajectory_of(run)
            except InputError as error:
                left_out[f"trajectory of {run.name}"] = str(error)
                continue
            if len(way) < 2 or not _fits(way, modules):
                continue
            assert run.facts is not None
            towards = [run if isinstance(run, ComparedAdapter) else None, sft.get(run.name)]
            found = _measured(way, [target for target in towards if target], modules, cache)
            cosines = iter(found.cosines.T)
            to_end, to_sft = (next(cosines) if target else np.full(len(way), np.nan) for target in towards)
            for number, step in enumerate(way):
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
                        "norm": found.norms[number],
                        "cosine_to_end": to_end[number],
                        "cosine_to_sft": to_sft[number],
                    }
                )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _fits(way: Mapping[int, Run], modules: Sequence[str]) -> bool:
    """Whether a run adapts what the others adapt: of one that diverged nothing was made sure of before."""
    with open_adapter(next(iter(way.values())).adapter) as adapter:
        return adapter.modules == list(modules)


def _measured(
    way: Mapping[int, Run], towards: Sequence[ComparedAdapter], modules: Sequence[str], cache: Cache
) -> Trajectory:
    key = [[recorded_adapter_hash(run) for run in way.values()], [target.sha256 for target in towards]]
    names = [field.name for field in fields(Trajectory)]
    known = cache.load("path", key, names)
    if known is None:
        with ExitStack() as stack:
            points = [stack.enter_context(open_adapter(run.adapter)) for run in way.values()]
            targets = [stack.enter_context(open_adapter(target.adapter)) for target in towards]
            known = vars(trajectory(points, targets, modules))
        cache.save("path", key, known)
    return Trajectory(**known)
