"""Tables of weight measures: by run, by run and module, by pair, by pair and layer, by pair and module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from losslens.measures import RunMeasure, WeightMeasure, run_weight_measures, weight_measures
from losslens.measures.nulls import expected_angles
from losslens.measures.views import Array, Draw, PairWeights, RunWeights

if TYPE_CHECKING:
    from losslens.measures.base_weights import PrincipalParts
    from losslens.measures.comparison import PairGeometry, RunGeometry
    from losslens.measures.gradients import PairGradients

Pair = tuple[str, str]
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class BaseComparison:
    """One run compared with the base weights; M modules.

    Attributes:
        base_norms: ‖W0‖_F, shape (M,).
        left, right, both, concentration, start_mean, start_variance, start_dimension: `PrincipalParts` of each module,
            shape (M,).
    """

    base_norms: Array
    left: Array
    right: Array
    both: Array
    concentration: Array
    start_mean: Array
    start_variance: Array
    start_dimension: Array

    @classmethod
    def of(cls, base_norms: Array, parts: Sequence[PrincipalParts]) -> BaseComparison:
        """Builds it from the parts of each module."""
        return cls(
            base_norms, *np.array([astuple(of_module) for of_module in parts], dtype=np.float64).reshape(-1, 7).T
        )


@dataclass(frozen=True)
class RunPath:
    """Path of one run through its snapshots; M modules, S snapshots with the end.

    Attributes:
        steps: ‖ΔW_s − ΔW_{s−1}‖_F², the first from ΔW = 0, shape (M, S).
        halfway: Overlap beyond chance of the left singular subspaces at half-time and at the end, shape (M,).
    """

    steps: Array
    halfway: Array


@dataclass(frozen=True)
class ComparedWeights:
    """Input of `weight_tables`: measured runs and pairs with the same modules.

    Attributes:
        modules: Names of the M modules.
        shapes: (out, in) of each module.
        runs: Geometry of each run, by name.
        pairs: Geometry of each pair.
        top: Number of leading singular directions whose subspaces are compared.
        against_base: Comparison of each run with W0, where the base is known.
        paths: Path of each run with snapshots.
        effects: `rotated.against_copies` of each run and module, shape (M, 3, 4), where it was asked for.
        gradients: `gradients.products_with_end` of each run, shape (M, 4, 4), where it was asked for.
        pair_gradients: Gradients of each pair, where they were asked for.
        ranks: For each run, the largest rank of each module; by default the rank found.
        same_a: For each pair, True if both runs started from the same A; None (default) if unknown.
        draw: Computes the expected angles of random subspaces.
    """

    modules: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    runs: Mapping[str, RunGeometry]
    pairs: Mapping[Pair, PairGeometry]
    top: int
    against_base: Mapping[str, BaseComparison] = field(default_factory=dict)
    paths: Mapping[str, RunPath] = field(default_factory=dict)
    effects: Mapping[str, Array] = field(default_factory=dict)
    gradients: Mapping[str, Array] = field(default_factory=dict)
    pair_gradients: Mapping[Pair, PairGradients] = field(default_factory=dict)
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    same_a: Mapping[Pair, bool | None] = field(default_factory=dict)
    draw: Draw = expected_angles


@dataclass(frozen=True)
class WeightTables:
    """The weight measures of several runs, with their nulls. A zero update has no direction: its cells are empty.

    Attributes:
        runs: One row per run.
        run_modules: One row per run and module, with its singular values and all drift angles (degrees).
        pairs: One row per pair.
        layers: One row per pair and layer.
        modules: One row per pair and module, with all angles (degrees, ascending).
    """

    runs: pd.DataFrame
    run_modules: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame


def weight_tables(compared: ComparedWeights) -> WeightTables:
    """Computes all weight measures of all runs and pairs: over all modules, by layer and by module."""
    runs, pairs = run_weights(compared), pair_weights(compared)
    run_keys = pd.DataFrame({"run": list(compared.runs)})
    pair_keys = pd.DataFrame(list(compared.pairs), columns=["run_a", "run_b"])
    layers = np.array([layer_of(module) for module in compared.modules], dtype=int)
    modules = pd.DataFrame({"module": list(compared.modules), "layer": layers})
    every = np.unique(layers)
    run_modules = _table(run_keys.merge(modules, how="cross"), run_weight_measures(), [runs.each()])
    pair_modules = _table(pair_keys.merge(modules, how="cross"), weight_measures(), [pairs.each()])
    of_pairs = _table(pair_keys, weight_measures(), [pairs])
    return WeightTables(
        _table(run_keys, run_weight_measures(), [runs]),
        run_modules.assign(singular_values=_lists(runs.singular_values), drift=_lists(np.degrees(runs.drift))),
        of_pairs,
        _table(
            pair_keys.merge(pd.DataFrame({"layer": every}), how="cross"),
            weight_measures("more"),
            [pairs.at(layers == layer) for layer in every],
        ),
        pair_modules.assign(
            angles_left=_lists(np.degrees(pairs.angles_left)), angles_right=_lists(np.degrees(pairs.angles_right))
        ),
    )


def run_weights(compared: ComparedWeights) -> RunWeights:
    """Builds the view of the runs, shape (runs, M)."""
    count = len(compared.modules)
    unknown = BaseComparison(*np.full((len(fields(BaseComparison)), count), np.nan))
    bases = [compared.against_base.get(name, unknown) for name in compared.runs]
    unmoved = RunPath(np.zeros((count, 0)), np.full(count, np.nan))
    paths = [compared.paths.get(name, unmoved) for name in compared.runs]
    against = {field.name: np.array([getattr(base, field.name) for base in bases]) for field in fields(BaseComparison)}
    return RunWeights(
        singular_values=_stacked([run.singular_values for run in compared.runs.values()], count),
        drift=_stacked([run.drift for run in compared.runs.values()], count),
        steps=_stacked([path.steps for path in paths], count),
        effects=np.array([compared.effects.get(name, np.full((count, 3, 4), np.nan)) for name in compared.runs]),
        gradients=np.array([compared.gradients.get(name, np.full((count, 4, 4), np.nan)) for name in compared.runs]),
        halfway=np.array([path.halfway for path in paths]),
        directions=np.array([min(compared.top, *shape) for shape in compared.shapes], dtype=np.float64),
        outputs=np.array([out for out, _ in compared.shapes], dtype=np.float64),
        **against,
    )


def pair_weights(compared: ComparedWeights) -> PairWeights:
    """Builds the view of the pairs, shape (pairs, M)."""
    count, of, pairs = len(compared.modules), list(compared.pairs), compared.pairs.values()
    squared = {name: np.nansum(run.singular_values**2, axis=1) for name, run in compared.runs.items()}
    found_ranks = {name: np.sum(~np.isnan(run.singular_values), axis=1) for name, run in compared.runs.items()}
    ranks = {name: np.asarray(compared.ranks.get(name, rank)) for name, rank in found_ranks.items()}
    outputs, inputs = np.array(compared.shapes, dtype=np.float64).reshape(-1, 2).T
    same_a = np.array([np.nan if (same := compared.same_a.get(pair)) is None else same for pair in of], dtype=float)

    gradients = [compared.pair_gradients.get(pair) for pair in of]

    def rows(values: Sequence[Array]) -> Array:
        return np.array(values, dtype=np.float64).reshape(len(of), count)

    return PairWeights(
        squared_a=rows([squared[a] for a, _ in of]),
        squared_b=rows([squared[b] for _, b in of]),
        inner=rows([pair.inner for pair in pairs]),
        right_overlap=rows([pair.right_overlap for pair in pairs]),
        angles_left=_stacked([pair.angles_left for pair in pairs], count),
        angles_right=_stacked([pair.angles_right for pair in pairs], count),
        u1=rows([pair.u1 for pair in pairs]),
        v1=rows([pair.v1 for pair in pairs]),
        gradients=np.array(
            [np.full((count, 4, 4), np.nan) if pair is None else pair.products for pair in gradients]
        ).reshape(len(of), count, 4, 4),
        gradient_overlap=rows([np.full(count, np.nan) if pair is None else pair.overlap for pair in gradients]),
        outputs=outputs,
        inputs=inputs,
        widths=rows([np.sum(~np.isnan(pair.angles_left), axis=-1) for pair in pairs]),
        inputs_met=rows(
            [_inputs_met(same, ranks[a], ranks[b], inputs) for same, (a, b) in zip(same_a, of, strict=True)]
        ),
        same_a=same_a,
        draw=compared.draw,
    )


def _inputs_met(same_a: float, rank_a: Array, rank_b: Array, inputs: Array) -> Array:
    """Computes `PairWeights.inputs_met`."""
    if same_a == 1:
        return np.minimum(np.maximum(rank_a, rank_b), inputs)
    return np.where(np.isnan(same_a), np.nan, inputs)


def layer_of(module: str) -> int:
    """Returns the layer number of a module; −1 if it is outside the layers."""
    match = _LAYER.search(module)
    return int(match[1]) if match else -1


def _table(keys: pd.DataFrame, measures: Sequence[RunMeasure | WeightMeasure], views: Sequence[Any]) -> pd.DataFrame:
    """Adds a column for each measure and its null to `keys`; the views of one run or pair fill consecutive rows."""
    columns: dict[str, Array] = {}
    for measure in measures:
        for name, of in ((measure.name, measure.value), (f"{measure.name}_null", measure.null)):
            if of is not None:
                columns[name] = np.stack([of(view) for view in views], axis=-1).reshape(-1)
    return pd.concat([keys, pd.DataFrame(columns, index=keys.index)], axis=1)


def _stacked(rows: Sequence[Array], modules: int) -> Array:
    """Stacks arrays of shape (M, k) into one of shape (rows, M, largest k), padded with NaN."""
    filled = np.full((len(rows), modules, max((row.shape[1] for row in rows), default=0)), np.nan)
    for into, row in zip(filled, rows, strict=True):
        into[:, : row.shape[1]] = row
    return filled


def _lists(values: Array) -> list[Array]:
    """Returns the rows of the last axis without NaN."""
    return [row[~np.isnan(row)] for matrix in values for row in matrix]
