"""The null beside every cosine and angle: what unrelated updates show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from losslens.analysis.cache import Cache
from losslens.analysis.pairs import Pair
from losslens.analysis.subjects import Gathered
from losslens.geometry.comparison import PairGeometry, RunGeometry
from losslens.geometry.floors import (
    AngleFloor,
    random_agreement,
    random_angle_floor,
    random_cosine_bound,
    shared_cosine_bound,
)

# Of the random subspaces.
_DRAWS, _SEED = 200, 0


class Unrelated:
    """What two updates would show that have nothing in common but their shapes, ranks and singular values.

    Where two runs started from one A they have their inputs in common, whatever their losses: for them the right
    singular vectors are random within the row space of A only, and the cosine is that of random outputs.

    Args:
        gathered: The adapters.
        runs: Their singular values.
        pairs: Their overlaps.
        top: Number of leading singular directions that are compared.
        cache: Of the drawn subspaces.
    """

    def __init__(
        self,
        gathered: Gathered,
        runs: Mapping[str, RunGeometry],
        pairs: Mapping[Pair, PairGeometry],
        top: int,
        cache: Cache,
    ) -> None:
        self._gathered = gathered
        self._top = top
        self._pairs = pairs
        self._norms = {name: np.sqrt(np.nansum(run.singular_values**2, axis=1)) for name, run in runs.items()}
        found = {name: np.sum(~np.isnan(run.singular_values), axis=1) for name, run in runs.items()}
        self._widths = {name: np.minimum(np.minimum(rank, gathered.ranks[name]), top) for name, rank in found.items()}
        self._cache = cache
        self._drawn: dict[tuple, AngleFloor] = {}

    def columns(self, pair: Pair, modules: Sequence[int], measures: Sequence[str]) -> dict[str, float]:
        """`<measure>_null` of a pair over some modules (by number)."""
        a, b = pair
        shapes = [self._gathered.shapes[m] for m in modules]
        dimensions = {"left": [out for out, _ in shapes], "right": [into for _, into in shapes]}
        shared = shares_initial_adapter(self._gathered, pair)
        if shared:
            ranks = self._gathered.ranks
            dimensions["right"] = [min(max(ranks[a][m], ranks[b][m]), self._gathered.shapes[m][1]) for m in modules]
        values: dict[str, float] = {"cosine": self._cosine(pair, modules)}
        for side, vector in (("left", "u1"), ("right", "v1")):
            widths = [int(min(self._widths[a][m], self._widths[b][m])) for m in modules]
            floor = self._angles([(d, k, k) for d, k in zip(dimensions[side], widths, strict=True)])
            values |= {f"angle_min_{side}": floor.smallest, f"angle_max_{side}": floor.largest}
            values[vector] = random_agreement(dimensions[side])
        if shared is None:  # what their inputs have in common is not known, so nothing can be said of the right side
            values |= {"v1": np.nan, "angle_min_right": np.nan, "angle_max_right": np.nan}
        return {f"{measure}_null": values[measure] for measure in measures}

    def cosines(self, pair: Pair) -> list[float]:
        """The null of the cosine of each module."""
        return [self._cosine(pair, [m]) for m in range(len(self._gathered.modules))]

    def off_principal(self, runs: pd.DataFrame) -> pd.DataFrame:
        """`runs` with the off-principal share of a random update: 1 − k²/(out·in) in each module."""
        inside = [min(self._top, *shape) ** 2 / (shape[0] * shape[1]) for shape in self._gathered.shapes]
        shares = [1 - np.average(inside, weights=self._norms[name] ** 2 + 1e-300) for name in runs["run"]]
        return runs.assign(off_principal_null=np.where(runs["off_principal"].isna(), np.nan, shares))

    def _cosine(self, pair: Pair, modules: Sequence[int]) -> float:
        norms = [self._norms[name][modules] for name in pair]
        shapes = [self._gathered.shapes[m] for m in modules]
        if shares_initial_adapter(self._gathered, pair) is not False:  # it holds whatever the inputs have in common
            return shared_cosine_bound(norms[0], norms[1], self._pairs[pair].right_overlap[modules], shapes)
        return random_cosine_bound(norms[0], norms[1], shapes)

    def _angles(self, spaces: list[tuple[int, int, int]]) -> AngleFloor:
        key = tuple(sorted(spaces))
        if key not in self._drawn:
            about = [key, _DRAWS, _SEED]
            known = self._cache.load("floor", about, ["smallest", "largest"])
            if known is None:
                floor = random_angle_floor(key, _DRAWS, _SEED)
                known = {"smallest": np.array(floor.smallest), "largest": np.array(floor.largest)}
                self._cache.save("floor", about, known)
            self._drawn[key] = AngleFloor(float(known["smallest"]), float(known["largest"]))
        return self._drawn[key]


def shares_initial_adapter(gathered: Gathered, pair: Pair) -> bool | None:
    """Whether both started from the same A; None where that is not known."""
    facts = [gathered.by_name[name].facts for name in pair]
    if facts[0] is None or facts[1] is None:
        return None
    return facts[0].initial_adapter.sha256 == facts[1].initial_adapter.sha256
