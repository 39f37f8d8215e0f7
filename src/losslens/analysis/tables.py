"""The tables of an analysis, put together from what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import midpoint_table
from losslens.analysis.floor_tables import Unrelated, shares_initial_adapter
from losslens.analysis.on_the_base import OnTheBase
from losslens.analysis.pairs import Pair, all_pairs
from losslens.analysis.passes import CkaOfPair
from losslens.analysis.repeats import ANGLES, MEASURES, pairing, with_levels
from losslens.analysis.subjects import Gathered
from losslens.geometry.connectivity import Curve
from losslens.geometry.tables import layer_of

# What a pair's weights are compared by: unrelated updates are the null of these.
_WITH_NULL = ("cosine", *ANGLES)
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
        arm_pairs: One row for every two arms, and for each arm and itself.
        repeats: One row an arm with several runs and what changed between them.
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
    arm_pairs: pd.DataFrame
    repeats: pd.DataFrame
    seeds: pd.DataFrame
    ablation: pd.DataFrame
    trajectories: pd.DataFrame
    training: pd.DataFrame
    map: pd.DataFrame


def pair_measures(
    gathered: Gathered, arms: Mapping[str, str], rows: pd.DataFrame, based: OnTheBase, unrelated: Unrelated
) -> pd.DataFrame:
    """What is measured of each pair but its accuracies, with its null, its arms, and what two equal losses would show.

    Args:
        gathered: What is compared.
        arms: The arm of each run.
        rows: One row a pair, with what its weights show.
        based: What passes through the base show.
        unrelated: The null.
    """
    everywhere = range(len(gathered.modules))
    seeds = {s.name: s.facts.seeds if s.facts else None for s in gathered.subjects}
    beside = [
        {
            "run_a": pair[0],
            "run_b": pair[1],
            "arm_a": arms[pair[0]],
            "arm_b": arms[pair[1]],
            "pairing": pairing(seeds[pair[0]], seeds[pair[1]], shares_initial_adapter(gathered, pair)),
            **unrelated.columns(pair, everywhere, _WITH_NULL),
            **_barrier_columns(based.curves.get(pair)),
            **_cka_columns(based.ckas.get(pair)),
        }
        for pair in all_pairs(gathered.names)
    ]
    first = ["run_a", "run_b", "arm_a", "arm_b", "pairing"]
    columns = [*first, *(f"{m}_null" for m in _WITH_NULL), *_BARRIERS, "cka_last", "cka_min"]
    table = rows.merge(pd.DataFrame(beside, columns=columns), on=["run_a", "run_b"])
    table = table.merge(midpoint_table(gathered, based.midpoints), on=["run_a", "run_b"], how="left")
    table = with_levels(table, MEASURES)
    return table[[*first, *(name for name in table if name not in first)]]


def layer_measures(gathered: Gathered, pairs: pd.DataFrame, layers: pd.DataFrame, unrelated: Unrelated) -> pd.DataFrame:
    """The layers of each pair, with their null, and what two equal losses would show.

    Args:
        gathered: What is compared.
        pairs: What `pair_measures` gives.
        layers: One row a pair and layer.
        unrelated: The null.
    """
    numbers: dict[int, list[int]] = {}
    for m, module in enumerate(gathered.modules):
        numbers.setdefault(layer_of(module), []).append(m)
    beside = [
        unrelated.columns((a, b), numbers[layer], _LAYER_MEASURES)
        for a, b, layer in layers[["run_a", "run_b", "layer"]].itertuples(index=False)
    ]
    table = pd.concat([layers, pd.DataFrame(beside, columns=[f"{m}_null" for m in _LAYER_MEASURES])], axis=1)
    kinds = ["arm_a", "arm_b", "pairing"]
    table = table.merge(pairs[["run_a", "run_b", *kinds]], on=["run_a", "run_b"], how="left")
    return with_levels(table, _LAYER_MEASURES, by=["layer"]).drop(columns=kinds)


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
