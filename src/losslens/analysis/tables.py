"""The tables of an analysis, put together from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import midpoint_table
from losslens.analysis.floor_tables import Unrelated, shares_initial_adapter, with_seeds
from losslens.analysis.on_the_base import OnTheBase
from losslens.analysis.pairs import Pair, all_pairs
from losslens.analysis.passes import CkaOfPair
from losslens.analysis.subjects import Gathered
from losslens.geometry.connectivity import Curve
from losslens.geometry.tables import layer_of

# What a pair's weights are compared by: unrelated updates are the null of these, other seeds stand beside all.
MEASURES = ("cosine", "u1", "v1", "angle_min_left", "angle_max_left", "angle_min_right", "angle_max_right")
SEED_MEASURES = (*MEASURES, "barrier_chord", "barrier_mean", "cka_last", "cka_min")
_BARRIERS = tuple(f"barrier_{form}{end}" for form in ("chord", "mean") for end in ("", "_low", "_high"))
_LAYER_MEASURES = ("cosine", "angle_min_left")


@dataclass(frozen=True)
class Tables:
    """The tables of one analysis; docs/measures.md says what stands in each column.

    Attributes:
        runs: One row a run and benchmark, the base first.
        pairs: One row a pair of runs.
        layers: One row a pair and layer.
        modules: One row a pair and module.
        run_modules: One row a run and module.
        connectivity: One row a chosen pair and alpha.
        cka: One row a chosen pair (or run and base) and hidden state.
        floors: One row a configuration with several seeds and kind of initial adapter.
        seeds: One row a configuration with several seeds and benchmark.
        ablation: One row an arm: runs that differ in their seeds only, and name of its learning rate.
        trajectories: One row a run with snapshots and step.
        training: One row a run and logged step.
        map: One row a run that has a direction: a point of a plane.
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame
    run_modules: pd.DataFrame
    connectivity: pd.DataFrame
    cka: pd.DataFrame
    floors: pd.DataFrame
    seeds: pd.DataFrame
    ablation: pd.DataFrame
    trajectories: pd.DataFrame
    training: pd.DataFrame
    map: pd.DataFrame


def pair_measures(gathered: Gathered, rows: pd.DataFrame, based: OnTheBase, unrelated: Unrelated) -> pd.DataFrame:
    """What is measured of each pair but its accuracies, with what unrelated updates and other seeds show."""
    everywhere = range(len(gathered.modules))
    beside = [
        {
            "run_a": pair[0],
            "run_b": pair[1],
            "shared_initial": shares_initial_adapter(gathered, pair),
            **unrelated.columns(pair, everywhere, MEASURES),
            **_barrier_columns(based.curves.get(pair)),
            **_cka_columns(based.ckas.get(pair)),
        }
        for pair in all_pairs(gathered.names)
    ]
    columns = ["run_a", "run_b", "shared_initial", *(f"{m}_null" for m in MEASURES), *_BARRIERS, "cka_last", "cka_min"]
    table = rows.merge(pd.DataFrame(beside, columns=columns), on=["run_a", "run_b"])
    table = table.merge(midpoint_table(gathered, based.midpoints), on=["run_a", "run_b"], how="left")
    return with_seeds(gathered, table, SEED_MEASURES)


def layer_measures(gathered: Gathered, layers: pd.DataFrame, unrelated: Unrelated) -> pd.DataFrame:
    """The layers of each pair, with what unrelated updates and other seeds show."""
    numbers: dict[int, list[int]] = {}
    for m, module in enumerate(gathered.modules):
        numbers.setdefault(layer_of(module), []).append(m)
    beside = [
        {
            "shared_initial": shares_initial_adapter(gathered, pair),
            **unrelated.columns(pair, numbers[layer], _LAYER_MEASURES),
        }
        for *pair_names, layer in layers[["run_a", "run_b", "layer"]].itertuples(index=False)
        for pair in [(pair_names[0], pair_names[1])]
    ]
    columns = ["shared_initial", *(f"{measure}_null" for measure in _LAYER_MEASURES)]
    table = pd.concat([layers, pd.DataFrame(beside, columns=columns)], axis=1)
    return with_seeds(gathered, table, _LAYER_MEASURES, by=["layer"])


def module_measures(gathered: Gathered, modules: pd.DataFrame, unrelated: Unrelated) -> pd.DataFrame:
    """The modules of each pair, with the cosine of unrelated updates."""
    nulls = [value for pair in all_pairs(gathered.names) for value in unrelated.cosines(pair)]
    return modules.assign(cosine_null=nulls)


def connectivity_table(curves: Mapping[Pair, Curve]) -> pd.DataFrame:
    """The curves, point by point."""
    rows = [
        {"run_a": a, "run_b": b, "alpha": alpha, "loss": loss, "loss_low": low, "loss_high": high}
        for (a, b), curve in curves.items()
        for alpha, loss, low, high in zip(curve.alphas, curve.loss, curve.low, curve.high, strict=True)
    ]
    return pd.DataFrame(rows, columns=["run_a", "run_b", "alpha", "loss", "loss_low", "loss_high"])


def cka_table(ckas: Mapping[Pair, CkaOfPair]) -> pd.DataFrame:
    """CKA, hidden state by hidden state: layer −1 are the embeddings, the others the outputs of the layers."""
    rows = [
        {
            "run_a": a,
            "run_b": b,
            "layer": number - 1,
            "cka_unbiased": found.unbiased[number],
            "cka_without_outlier": found.without_outlier[number],
            "outlier_dimension": found.outliers[number],
            "n": found.n,
        }
        for (a, b), found in ckas.items()
        for number in range(len(found.unbiased))
    ]
    columns = ["run_a", "run_b", "layer", "cka_unbiased", "cka_without_outlier", "outlier_dimension", "n"]
    return pd.DataFrame(rows, columns=columns)


def _barrier_columns(curve: Curve | None) -> dict[str, float]:
    values = [*curve.chord, *curve.mean] if curve else [np.nan] * 6
    return dict(zip(_BARRIERS, values, strict=True))


def _cka_columns(found: CkaOfPair | None) -> dict[str, Any]:
    if found is None:
        return {"cka_last": np.nan, "cka_min": np.nan}
    defined = found.unbiased[~np.isnan(found.unbiased)]
    return {"cka_last": float(found.unbiased[-1]), "cka_min": float(defined.min()) if defined.size else np.nan}
