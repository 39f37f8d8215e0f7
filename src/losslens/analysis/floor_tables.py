"""The floor beside every cosine and angle: unrelated updates, and the same method at other seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.cache import Cache
from losslens.analysis.pairs import Pair
from losslens.analysis.subjects import Gathered
from losslens.geometry.comparison import RunGeometry
from losslens.geometry.floors import AngleFloor, random_agreement, random_angle_floor, random_cosine_bound

# Of the random subspaces.
_DRAWS, _SEED = 200, 0


class Unrelated:
    """What two unrelated updates of the same shapes, ranks and singular values would show.

    Args:
        gathered: The adapters.
        runs: Their singular values.
        top: Number of leading singular directions that are compared.
        cache: Of the drawn subspaces.
    """

    def __init__(self, gathered: Gathered, runs: Mapping[str, RunGeometry], top: int, cache: Cache) -> None:
        self._shapes = gathered.shapes
        self._norms = {name: np.sqrt(np.nansum(run.singular_values**2, axis=1)) for name, run in runs.items()}
        self._widths = {
            name: np.minimum(np.sum(~np.isnan(run.singular_values), axis=1), top) for name, run in runs.items()
        }
        self._cache = cache
        self._drawn: dict[tuple, AngleFloor] = {}
        self._agreements: dict[tuple, float] = {}

    def columns(self, pair: Pair, modules: Sequence[int], measures: Sequence[str]) -> dict[str, float]:
        """`<measure>_null` of a pair over some modules (by number)."""
        a, b = pair
        shapes = [self._shapes[m] for m in modules]
        values: dict[str, float] = {}
        for number, (side, vector) in enumerate((("left", "u1"), ("right", "v1"))):
            spaces = [
                (shape[number], int(self._widths[a][m]), int(self._widths[b][m]))
                for shape, m in zip(shapes, modules, strict=True)
            ]
            floor = self._angles(spaces)
            values |= {f"angle_min_{side}": floor.smallest, f"angle_max_{side}": floor.largest}
            values[vector] = self._agreement(tuple(shape[number] for shape in shapes))
        values["cosine"] = random_cosine_bound(self._norms[a][modules], self._norms[b][modules], shapes)
        return {f"{measure}_null": values[measure] for measure in measures}

    def _angles(self, spaces: list[tuple[int, int, int]]) -> AngleFloor:
        key = tuple(sorted(spaces))
        if key not in self._drawn:
            about = [key, _DRAWS, _SEED]
            known = self._cache.load("floor", about)
            if known is None:
                known = {name: np.array(value) for name, value in vars(random_angle_floor(key, _DRAWS, _SEED)).items()}
                self._cache.save("floor", about, known)
            self._drawn[key] = AngleFloor(**{name: float(value) for name, value in known.items()})
        return self._drawn[key]

    def _agreement(self, dimensions: tuple[int, ...]) -> float:
        if dimensions not in self._agreements:
            self._agreements[dimensions] = random_agreement(dimensions)
        return self._agreements[dimensions]


def shares_initial_adapter(gathered: Gathered, pair: Pair) -> bool | None:
    """Whether both started from the same A; None where that is not known."""
    initial = {subject.name: subject.initial_sha256 for subject in gathered.subjects}
    a, b = (initial[name] for name in pair)
    return None if a is None or b is None else a == b


def seed_floors(
    gathered: Gathered, table: pd.DataFrame, measures: Sequence[str], by: Sequence[str] = ()
) -> pd.DataFrame:
    """The mean of `measures` over the pairs of runs that differ only in their seeds.

    Args:
        gathered: The adapters.
        table: One row a pair (and value of `by`), with run_a, run_b and shared_initial.
        measures: Columns of it.
        by: Further columns, whose values are kept apart.

    Returns:
        One row a configuration, kind of initial adapter (`shared`, `independent`) and value of `by`, with the number of
        pairs.
    """
    configuration = {subject.name: subject.configuration for subject in gathered.subjects}
    seeds = {subject.name: subject.seeds for subject in gathered.subjects}
    same = [
        configuration[a] is not None and configuration[a] == configuration[b] and seeds[a] != seeds[b]
        for a, b in zip(table["run_a"], table["run_b"], strict=True)
    ]
    repeats = table[np.array(same, dtype=bool)]
    repeats = repeats.assign(
        configuration=repeats["run_a"].map(configuration),
        initial=np.where(repeats["shared_initial"].astype(bool), "shared", "independent"),
    )
    grouped = repeats.groupby(["configuration", "initial", *by], sort=False)
    return grouped[list(measures)].mean().assign(pairs=grouped.size()).reset_index()


def with_seed_floors(
    gathered: Gathered, table: pd.DataFrame, measures: Sequence[str], by: Sequence[str] = ()
) -> pd.DataFrame:
    """`table` with the seed floor of the two runs' own configurations beside each of `measures`.

    `<measure>_seed_shared` from repetitions that share the initial adapter, `<measure>_seed_independent` from those
    that do not; where both runs have repetitions, the mean of the two. Empty where neither has.
    """
    configuration = {subject.name: subject.configuration for subject in gathered.subjects}
    floors = seed_floors(gathered, table, measures, by)
    columns: dict[str, np.ndarray] = {}
    for kind in ("shared", "independent"):
        of_kind = floors[floors["initial"] == kind]
        sides = []
        for run in ("run_a", "run_b"):
            keys = table[list(by)].assign(configuration=table[run].map(configuration))
            found = keys.merge(of_kind, on=["configuration", *by], how="left")
            sides.append(found[list(measures)].to_numpy(dtype=np.float64))
        present = ~np.isnan(sides)
        total = np.where(present, sides, 0.0).sum(axis=0)
        with np.errstate(invalid="ignore"):
            means = total / present.sum(axis=0)
        columns |= {f"{measure}_seed_{kind}": means[:, n] for n, measure in enumerate(measures)}
    return table.assign(**columns)


def floor_table(gathered: Gathered, pairs: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """`seed_floors` of whole runs, with each configuration's method, lr, rank and model."""
    floors = seed_floors(gathered, pairs, measures)
    known: dict[str | None, dict[str, Any]] = {}
    for subject in gathered.subjects:
        if subject.configuration and subject.configuration not in known:
            config = subject.manifest["config"]
            known[subject.configuration] = {
                "method": subject.manifest["method"],
                "lr": config["lr"]["name"],
                "rank": config["lora_rank"]["r"],
                "model": config["model"]["name"],
            }
    for number, name in enumerate(("method", "lr", "rank", "model")):
        floors.insert(number, name, [known[configuration][name] for configuration in floors["configuration"]])
    return floors.drop(columns="configuration")
