"""The floor beside every cosine and angle: the same method at other seeds, and unrelated updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.pairs import Pair
from losslens.analysis.subjects import Gathered
from losslens.geometry.comparison import RunGeometry
from losslens.geometry.floors import AngleFloor, random_agreement, random_cosine_bound

MEASURES = ("cosine", "u1", "v1", "angle_min_left", "angle_max_left", "angle_min_right", "angle_max_right")


def shares_initial_adapter(gathered: Gathered, pair: Pair) -> bool | None:
    """Whether both started from the same A; None where that is not known."""
    initial = {subject.name: subject.initial_sha256 for subject in gathered.subjects}
    a, b = (initial[name] for name in pair)
    return None if a is None or b is None else a == b


def null_columns(
    gathered: Gathered,
    runs: Mapping[str, RunGeometry],
    pair: Pair,
    angles: tuple[AngleFloor, AngleFloor],
) -> dict[str, float]:
    """What two unrelated updates of these shapes, ranks and singular values would show, for each of `MEASURES`."""
    norms = [np.sqrt(np.nansum(runs[name].singular_values ** 2, axis=1)) for name in pair]
    left, right = angles
    values = {
        "cosine": random_cosine_bound(norms[0], norms[1], gathered.shapes),
        "u1": random_agreement([out for out, _ in gathered.shapes]),
        "v1": random_agreement([into for _, into in gathered.shapes]),
        "angle_min_left": left.smallest,
        "angle_max_left": left.largest,
        "angle_min_right": right.smallest,
        "angle_max_right": right.largest,
    }
    return {f"{name}_null": values[name] for name in MEASURES}


def seed_floors(gathered: Gathered, pairs: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration and kind of initial adapter (`shared`, `independent`): its runs at other seeds compared.

    Columns: method, lr, rank, model, initial, pairs (how many), and of each of `MEASURES` the mean.
    """
    configuration = {subject.name: subject.configuration for subject in gathered.subjects}
    seeds = {subject.name: subject.seeds for subject in gathered.subjects}
    facts = {subject.name: subject.manifest for subject in gathered.subjects}
    same = [
        configuration[a] is not None and configuration[a] == configuration[b] and seeds[a] != seeds[b]
        for a, b in zip(pairs["run_a"], pairs["run_b"], strict=True)
    ]
    rows: list[dict[str, Any]] = []
    repeats = pairs[np.array(same, dtype=bool)]
    keys = [repeats["run_a"].map(configuration), repeats["shared_initial"]]
    for (_, shared), group in repeats.groupby(keys, sort=False):
        manifest = facts[group.iloc[0]["run_a"]]
        config = manifest["config"]
        rows.append(
            {
                "configuration": configuration[group.iloc[0]["run_a"]],
                "method": manifest["method"],
                "lr": config["lr"]["name"],
                "rank": config["lora_rank"]["r"],
                "model": config["model"]["name"],
                "initial": "shared" if shared else "independent",
                "pairs": len(group),
                **{name: group[name].mean() for name in MEASURES},
            }
        )
    return pd.DataFrame(rows, columns=["configuration", "method", "lr", "rank", "model", "initial", "pairs", *MEASURES])


def seed_columns(gathered: Gathered, floors: pd.DataFrame, pair: Pair) -> dict[str, float]:
    """The seed floor of the two runs' own configurations, for each of `MEASURES`; empty where there are no other seeds.

    `<measure>_seed_shared` from repetitions that share the initial adapter, `<measure>_seed_independent` from those
    that do not.
    """
    configuration = {subject.name: subject.configuration for subject in gathered.subjects}
    own = floors[floors["configuration"].isin([configuration[name] for name in pair])]
    return {
        f"{measure}_seed_{kind}": float(own.loc[own["initial"] == kind, measure].mean())
        for measure in MEASURES
        for kind in ("shared", "independent")
    }
