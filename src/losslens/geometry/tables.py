"""Sums a comparison up: by run, by run and module, by pair, by pair and layer, by pair and module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from losslens.geometry.comparison import PairGeometry, RunGeometry
from losslens.geometry.measures import cosine, effective_rank, orthogonal_component, stable_rank
from losslens.updates.base import Array

_COSINES = ("cosine", "orthogonal_a_to_b", "orthogonal_b_to_a")
_SIDES, _ENDS = ("left", "right"), ("min", "max")
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class AgainstBase:
    """One run against the weights it is added to. M modules.

    Attributes:
        base_norms: ‖W0‖_F, shape (M,).
        off_principal: `off_principal_share` of each module, shape (M,).
    """

    base_norms: Array
    off_principal: Array


@dataclass(frozen=True)
class GeometryTables:
    """The geometry of several runs. What has no direction (an update of 0) gives empty cells.

    Attributes:
        runs: One row a run: norm (‖ΔW‖_F over all modules), relative_norm (‖ΔW‖/‖W0‖ over the adapted modules),
            effective_rank and stable_rank (means over modules), drift_min and drift_max (medians over modules of the
            smallest and largest principal angle between A and the initial A, degrees), off_principal (share of ‖ΔW‖²
            over all modules).
        run_modules: One row a run and module: the same of one module, with its singular values and all drift angles.
        pairs: One row a pair: cosine, orthogonal components, medians over modules of the smallest and largest
            principal angle on both sides (degrees), means over modules of the agreement of u1 and v1.
        layers: One row a pair and layer: cosine, orthogonal_a_to_b, angle_min_left (median, degrees).
        modules: One row a pair and module, with every angle (degrees, ascending).
    """

    runs: pd.DataFrame
    run_modules: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame


def geometry_tables(
    modules: Sequence[str],
    runs: Mapping[str, RunGeometry],
    pairs: Mapping[tuple[str, str], PairGeometry],
    against_base: Mapping[str, AgainstBase],
) -> GeometryTables:
    """The tables of `runs`, by name, and their `pairs`; `against_base` may hold all of the runs or none."""
    squared = {name: np.nansum(run.singular_values**2, axis=1) for name, run in runs.items()}
    layers = np.array([layer_of(module) for module in modules])
    run_rows, run_module_rows = [], []
    for name, run in runs.items():
        rows = _run_modules(modules, layers, run, against_base.get(name))
        run_module_rows += [{"run": name, **row} for row in rows]
        run_rows.append({"run": name, **_run(run, squared[name], against_base.get(name))})
    pair_rows, layer_rows, module_rows = [], [], []
    for (a, b), pair in pairs.items():
        names = {"run_a": a, "run_b": b}
        left, right = np.degrees(pair.angles_left), np.degrees(pair.angles_right)
        everywhere = np.ones(len(modules), dtype=bool)
        pair_rows.append(
            {
                **names,
                **_cosines(pair, squared[a], squared[b], everywhere),
                "u1": _mean(pair.u1),
                "v1": _mean(pair.v1),
                "angle_min_left": median(left[:, 0]),
                "angle_max_left": median(_largest(left)),
                "angle_min_right": median(right[:, 0]),
                "angle_max_right": median(_largest(right)),
            }
        )
        for layer in np.unique(layers):
            here = layers == layer
            columns = _cosines(pair, squared[a], squared[b], here)
            del columns["orthogonal_b_to_a"]
            layer_rows.append({**names, "layer": int(layer), **columns, "angle_min_left": median(left[here, 0])})
        for m, module in enumerate(modules):
            here = np.arange(len(modules)) == m
            columns = _cosines(pair, squared[a], squared[b], here)
            del columns["orthogonal_b_to_a"]
            agreements = {"u1": pair.u1[m], "v1": pair.v1[m]}
            angles = {"angles_left": left[m], "angles_right": right[m]}
            module_rows.append({**names, "module": module, "layer": layers[m], **columns, **agreements, **angles})
    keys = ["run_a", "run_b"]
    return GeometryTables(
        pd.DataFrame(run_rows),
        pd.DataFrame(run_module_rows),
        pd.DataFrame(
            pair_rows,
            columns=[*keys, *_COSINES, "u1", "v1", *(f"angle_{end}_{side}" for side in _SIDES for end in _ENDS)],
        ),
        pd.DataFrame(layer_rows, columns=[*keys, "layer", *_COSINES[:2], "angle_min_left"]),
        pd.DataFrame(
            module_rows, columns=[*keys, "module", "layer", *_COSINES[:2], "u1", "v1", "angles_left", "angles_right"]
        ),
    )


def layer_of(module: str) -> int:
    """The number of the layer that a module belongs to; −1 for one outside the layers."""
    match = _LAYER.search(module)
    return int(match[1]) if match else -1


def _run_modules(
    modules: Sequence[str], layers: np.ndarray, run: RunGeometry, base: AgainstBase | None
) -> list[dict[str, Any]]:
    rows = []
    for m, module in enumerate(modules):
        values = _present(run.singular_values[m])
        drift = np.degrees(_present(run.drift[m]))
        norm = float(np.sqrt(np.sum(values**2)))
        rows.append(
            {
                "module": module,
                "layer": int(layers[m]),
                "norm": norm,
                "relative_norm": norm / base.base_norms[m] if base else np.nan,
                "effective_rank": effective_rank(values),
                "stable_rank": stable_rank(values),
                "drift_min": drift[0] if drift.size else np.nan,
                "drift_max": drift[-1] if drift.size else np.nan,
                "off_principal": base.off_principal[m] if base else np.nan,
                "singular_values": values,
                "drift": drift,
            }
        )
    return rows


def run_measures(run: RunGeometry) -> dict[str, float]:
    """Norm, ranks and drift of one run over all modules, as `GeometryTables.runs` has them."""
    values = [_present(row) for row in run.singular_values]
    drift = [np.degrees(_present(row)) for row in run.drift]
    return {
        "norm": float(np.sqrt(sum(np.sum(row**2) for row in values))),
        "effective_rank": _mean([effective_rank(row) for row in values]),
        "stable_rank": _mean([stable_rank(row) for row in values]),
        "drift_min": median([row[0] for row in drift if row.size]),
        "drift_max": median([row[-1] for row in drift if row.size]),
    }


def _run(run: RunGeometry, squared: Array, base: AgainstBase | None) -> dict[str, Any]:
    columns: dict[str, Any] = {**run_measures(run), "relative_norm": np.nan, "off_principal": np.nan}
    if base:
        norm = columns["norm"]
        columns["relative_norm"] = norm / float(np.sqrt(np.sum(base.base_norms**2)))
        columns["off_principal"] = float(np.nansum(base.off_principal * squared)) / norm**2 if norm > 0 else np.nan
    order = ("norm", "relative_norm", "off_principal", "effective_rank", "stable_rank", "drift_min", "drift_max")
    return {name: columns[name] for name in order}


def _cosines(pair: PairGeometry, squared_a: Array, squared_b: Array, modules: np.ndarray) -> dict[str, Any]:
    norms = (float(np.sqrt(squared[modules].sum())) for squared in (squared_a, squared_b))
    value = cosine(float(pair.inner[modules].sum()), *norms)
    # √(1 − cos²) is the same in both directions; both columns stand for readers of either.
    share = orthogonal_component(value)
    return {"cosine": value, "orthogonal_a_to_b": share, "orthogonal_b_to_a": share}


def _largest(angles: Array) -> Array:
    """The largest angle of each row; NaN for a row without any."""
    return np.where(np.isnan(angles[:, 0]), np.nan, np.nan_to_num(angles, nan=-1.0).max(axis=1))


def _present(values: Array) -> Array:
    return values[~np.isnan(values)]


def _mean(values: Sequence[float] | Array) -> float:
    kept = _present(np.asarray(values, dtype=np.float64))
    return float(kept.mean()) if kept.size else float("nan")


def median(values: Sequence[float] | Array) -> float:
    """The median of what is not NaN; NaN when that is nothing."""
    kept = _present(np.asarray(values, dtype=np.float64))
    return float(np.median(kept)) if kept.size else float("nan")
