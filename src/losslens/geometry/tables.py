"""Sums a comparison up: by pair, by pair and layer, by pair and module, and by run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from losslens.geometry.comparison import ModuleComparison
from losslens.geometry.measures import cosine, effective_rank, orthogonal_component, stable_rank
from losslens.geometry.subspaces import Array

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class GeometryTables:
    """The geometry of several runs.

    Attributes:
        runs: One row a run: norm (‖ΔW‖_F over all modules), effective_rank and stable_rank (means over modules).
        pairs: One row a pair: cosine, orthogonal components, medians over modules of the smallest and largest
            principal angle on both sides (degrees), means over modules of the agreement of u1 and v1.
        layers: One row a pair and layer: cosine, orthogonal_a_to_b, angle_min_left (median, degrees).
        modules: One row a pair and module, with every angle (degrees, ascending).
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame


def geometry_tables(comparisons: Sequence[ModuleComparison], names: Sequence[str]) -> GeometryTables:
    """The tables of the runs called `names`. What has no direction (an update of 0) gives empty cells."""
    pairs = list(combinations(range(len(names)), 2))
    inner = np.sum([c.inner for c in comparisons], axis=0)
    by_layer: dict[int, list[ModuleComparison]] = {}
    for comparison in comparisons:
        by_layer.setdefault(layer_of(comparison.module), []).append(comparison)
    left = np.degrees([c.angles_left for c in comparisons])  # (modules, pairs, k)
    right = np.degrees([c.angles_right for c in comparisons])

    pair_rows, layer_rows, module_rows = [], [], []
    for n, (i, j) in enumerate(pairs):
        pair = {"run_a": names[i], "run_b": names[j]}
        pair_rows.append(
            {
                **pair,
                **_cosine_columns(inner, i, j),
                "u1": _mean([c.u1[n] for c in comparisons]),
                "v1": _mean([c.v1[n] for c in comparisons]),
                "angle_min_left": _median(left[:, n, 0]),
                "angle_max_left": _median(_largest(left[:, n])),
                "angle_min_right": _median(right[:, n, 0]),
                "angle_max_right": _median(_largest(right[:, n])),
            }
        )
        for layer, group in sorted(by_layer.items()):
            columns = _cosine_columns(np.sum([c.inner for c in group], axis=0), i, j)
            del columns["orthogonal_b_to_a"]
            smallest = _median(np.degrees([c.angles_left[n, 0] for c in group]))
            layer_rows.append({**pair, "layer": layer, **columns, "angle_min_left": smallest})
        for m, c in enumerate(comparisons):
            norms = np.sqrt(np.diag(c.inner))
            module_rows.append(
                {
                    **pair,
                    "module": c.module,
                    "layer": layer_of(c.module),
                    "cosine": cosine(c.inner[i, j], norms[i], norms[j]),
                    "u1": c.u1[n],
                    "v1": c.v1[n],
                    "angles_left": left[m, n],
                    "angles_right": right[m, n],
                }
            )
    runs = [
        {
            "run": name,
            "norm": float(np.sqrt(inner[i, i])),
            "effective_rank": _mean([effective_rank(c.singular_values[i]) for c in comparisons]),
            "stable_rank": _mean([stable_rank(c.singular_values[i]) for c in comparisons]),
        }
        for i, name in enumerate(names)
    ]
    return GeometryTables(*(pd.DataFrame(rows) for rows in (runs, pair_rows, layer_rows, module_rows)))


def layer_of(module: str) -> int:
    """The number of the layer that a module belongs to; −1 for one outside the layers."""
    match = _LAYER.search(module)
    return int(match[1]) if match else -1


def _cosine_columns(inner: Array, i: int, j: int) -> dict[str, Any]:
    value = cosine(inner[i, j], np.sqrt(inner[i, i]), np.sqrt(inner[j, j]))
    # The norm ratio is the same in both directions; both columns stand for readers of either.
    share = orthogonal_component(value)
    return {"cosine": value, "orthogonal_a_to_b": share, "orthogonal_b_to_a": share}


def _largest(angles: Array) -> Array:
    """The largest angle of each row; NaN for a row without any."""
    return np.where(np.isnan(angles[:, 0]), np.nan, np.nanmax(np.nan_to_num(angles, nan=-1.0), axis=1))


def _mean(values: Sequence[float] | Array) -> float:
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    return float(kept.mean()) if kept.size else float("nan")


def _median(values: Sequence[float] | Array) -> float:
    kept = np.asarray(values, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    return float(np.median(kept)) if kept.size else float("nan")
