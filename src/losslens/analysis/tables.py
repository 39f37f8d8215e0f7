"""Builds the tables of an analysis from the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import midpoint_table
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort
from losslens.analysis.function_space import FunctionSpaceResults
from losslens.analysis.gradients import Gradients
from losslens.analysis.pairs import Pair
from losslens.analysis.repeats import pairing, with_levels
from losslens.measures import function_measures, pair_measures, run_function_measures, weight_measures
from losslens.measures.activations import POSITIONS
from losslens.measures.answers import PairAnswers
from losslens.measures.behaviour import PairBehaviour
from losslens.measures.cka import CkaOfPair
from losslens.measures.comparison import PairGeometry, RunGeometry
from losslens.measures.connectivity import Curve
from losslens.measures.mds import angles, mds
from losslens.measures.nulls import expected_angles
from losslens.measures.tables import ComparedWeights, RunPath
from losslens.measures.views import Functions, RunFunctions

# Draws of the random subspaces.
_DRAWS, _SEED = 200, 0


@dataclass(frozen=True)
class Tables:
    """The tables of one analysis; docs/reference/measures.md defines their columns.

    Attributes:
        runs: One row per run and benchmark, the base first.
        pairs: One row per pair of runs.
        layers: One row per pair and layer.
        modules: One row per pair and module.
        run_modules: One row per run and module.
        connectivity: One row per chosen pair and alpha.
        cka: One row per chosen pair (or run and base) and hidden state.
        shifts: One row per chosen pair, position and hidden state.
        arm_pairs: One row for every two arms, and for each arm with itself.
        repeats: One row per arm with several runs and kind of repeat.
        seeds: One row per configuration with several seeds and benchmark.
        arms: One row per arm (runs that differ only in their seeds) and name of its learning rate.
        trajectories: One row per run with snapshots and step.
        training: One row per run and logged step.
        tuning: One row per loss, learning rate and rule of choice, if rates were chosen.
        tuning_pairs: One row per set of rates and two losses (or a loss and the base), if rates were chosen.
        mds: One row per run with a non-zero update: its point in the plane.
        factors: One row per arm whose loss declares the factors of its weights.
        clusters: One row per factor: whether the updates of losses that share it lie closer together.
        classes: One row per step and loss that shares its first step with another.
        interventions: One row per changed model, if causal checks were asked for, after the base and the runs.
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame
    run_modules: pd.DataFrame
    connectivity: pd.DataFrame
    cka: pd.DataFrame
    shifts: pd.DataFrame
    arm_pairs: pd.DataFrame
    repeats: pd.DataFrame
    seeds: pd.DataFrame
    arms: pd.DataFrame
    trajectories: pd.DataFrame
    training: pd.DataFrame
    tuning: pd.DataFrame
    tuning_pairs: pd.DataFrame
    mds: pd.DataFrame
    factors: pd.DataFrame
    clusters: pd.DataFrame
    classes: pd.DataFrame
    interventions: pd.DataFrame


def compared_weights(
    cohort: Cohort,
    runs: Mapping[str, RunGeometry],
    pairs: Mapping[Pair, PairGeometry],
    based: FunctionSpaceResults,
    paths: Mapping[str, RunPath],
    gradients: Gradients,
    top: int,
    cache: Cache,
) -> ComparedWeights:
    """Collects the input of `weight_tables`, including what the nulls depend on."""
    return ComparedWeights(
        modules=cohort.modules,
        shapes=cohort.shapes,
        runs=runs,
        pairs=pairs,
        against_base=based.against_base,
        effects=based.effects,
        paths=paths,
        gradients=gradients.runs,
        pair_gradients=gradients.pairs,
        top=top,
        ranks=cohort.ranks,
        same_a={pair: shares_initial_adapter(cohort, pair) for pair in pairs},
        draw=partial(_drawn_angles, cache),
    )


def _drawn_angles(cache: Cache, spaces: tuple[tuple[int, int, int], ...]) -> tuple[float, float]:
    key = [spaces, _DRAWS, _SEED]
    known = cache.load("null", key, ["smallest", "largest"])
    if known is None:
        angles = expected_angles(spaces, _DRAWS, _SEED)
        known = cache.save("null", key, dict(zip(("smallest", "largest"), angles, strict=True)))
    return float(known["smallest"]), float(known["largest"])


def shares_initial_adapter(cohort: Cohort, pair: Pair) -> bool | None:
    """True if both runs started from the same A; None if unknown."""
    same = _same_start(cohort, pair)
    # Full fine-tuning has no A that would confine its update.
    return same and not any(cohort.by_name[name].base for name in pair)


def _same_start(cohort: Cohort, pair: Pair) -> bool | None:
    """True if both runs started from the same A, or both from the base itself; None if unknown."""
    facts = [cohort.by_name[name].facts for name in pair]
    if facts[0] is None or facts[1] is None:
        return None
    return facts[0].start == facts[1].start


def measured_pair_table(
    cohort: Cohort,
    arms: Mapping[str, str],
    rows: pd.DataFrame,
    based: FunctionSpaceResults,
    answers: Mapping[Pair, PairAnswers],
) -> pd.DataFrame:
    """Builds the table of pairs without accuracies: arms, pairing, measures, and ceilings or repeat levels.

    Args:
        cohort: The compared adapters.
        arms: The arm of each run.
        rows: One row per pair, with its weight measures.
        based: The measures in function space.
        answers: The answers of each scored pair.
    """
    seeds = {s.name: s.facts.seeds if s.facts else None for s in cohort.members}
    own = {s.name for s in cohort.members if s.facts and s.facts.own_samples}
    pairs = list(zip(rows["run_a"], rows["run_b"], strict=True))
    functions = Functions(
        curves=[based.curves.get(pair) for pair in pairs],
        ckas=[based.ckas.get(pair) for pair in pairs],
        behaviours=[based.pair_behaviours.get(pair) for pair in pairs],
        answers=[answers.get(pair) for pair in pairs],
    )
    columns: dict[str, Any] = {}
    for measure in function_measures():
        columns[measure.name] = measure.value(functions)
        if measure.null is not None:
            columns[f"{measure.name}_null"] = measure.null(functions)
        if measure.interval is not None:
            columns |= zip((f"{measure.name}_low", f"{measure.name}_high"), measure.interval(functions), strict=True)
    table = rows.assign(
        arm_a=rows["run_a"].map(arms),
        arm_b=rows["run_b"].map(arms),
        pairing=[pairing(seeds[a], seeds[b], _same_start(cohort, (a, b)), (a in own, b in own)) for a, b in pairs],
        **columns,
    )
    table = table.merge(midpoint_table(cohort, based.midpoints), on=["run_a", "run_b"], how="left")
    table = with_levels(table, [measure.name for measure in pair_measures()])
    first = ["run_a", "run_b", "arm_a", "arm_b", "pairing"]
    return table[[*first, *(name for name in table if name not in first)]]


def run_function_table(base: str, runs: pd.DataFrame, based: FunctionSpaceResults) -> pd.DataFrame:
    """Adds the measures by forward passes to those of the weights, and a row for the base with its own.

    Args:
        base: The name of the base.
        runs: One row per run, with its weight measures.
        based: The measures in function space.
    """
    functions = RunFunctions(runs["norm"].to_numpy(), [based.run_behaviours.get(run) for run in runs["run"]])
    columns = {}
    for measure in run_function_measures():
        columns[measure.name] = measure.value(functions)
        if measure.null is not None:
            columns[f"{measure.name}_null"] = measure.null(functions)
    of_base = pd.DataFrame({"run": [base], "representation_rank": [based.base_rank]})
    return pd.concat([runs.assign(**columns), of_base], ignore_index=True)


def measured_layer_table(pairs: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Adds ceilings and repeat levels to the layers of each pair.

    Args:
        pairs: The table of `measured_pair_table`.
        layers: One row per pair and layer.
    """
    kinds = ["arm_a", "arm_b", "pairing"]
    table = layers.merge(pairs[["run_a", "run_b", *kinds]], on=["run_a", "run_b"], how="left")
    return with_levels(table, [measure.name for measure in weight_measures("more")], by=["layer"]).drop(columns=kinds)


def connectivity_table(curves: Mapping[Pair, Curve]) -> pd.DataFrame:
    """Returns the loss curves, one row per point."""
    rows = [
        {"run_a": a, "run_b": b, "alpha": alpha, "loss": loss, "loss_low": low, "loss_high": high}
        for (a, b), curve in curves.items()
        for alpha, loss, low, high in zip(curve.alphas, curve.loss, curve.low, curve.high, strict=True)
    ]
    return pd.DataFrame(rows, columns=["run_a", "run_b", "alpha", "loss", "loss_low", "loss_high"])


def shift_table(behaviours: dict[Pair, PairBehaviour]) -> pd.DataFrame:
    """Returns the cosines of activation shifts, one row per pair, position and hidden state."""
    rows = [
        {
            "run_a": a, "run_b": b, "position": position, "layer": layer - 1,
            "shift_cosine": of.shift_cosine[place, layer], "shift_cosine_null": of.shift_cosine_null[place, layer],
        }
        for (a, b), of in behaviours.items()
        for place, position in enumerate(POSITIONS)
        for layer in range(of.shift_cosine.shape[1])
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["run_a", "run_b", "position", "layer", "shift_cosine", "shift_cosine_null"])


def cka_table(ckas: Mapping[Pair, CkaOfPair]) -> pd.DataFrame:
    """Returns CKA by hidden state: layer −1 is the embeddings, the others are the outputs of the layers."""
    rows = [
        {
            "run_a": a,
            "run_b": b,
            "layer": number - 1,
            "cka_unbiased": of_pair.unbiased[number],
            "cka_without_outlier": of_pair.without_outlier[number],
            "outlier_dimension": of_pair.outliers[number],
            "n": of_pair.n,
        }
        for (a, b), of_pair in ckas.items()
        for number in range(len(of_pair.unbiased))
    ]
    columns = ["run_a", "run_b", "layer", "cka_unbiased", "cka_without_outlier", "outlier_dimension", "n"]
    return pd.DataFrame(rows, columns=columns)


def mds_table(pairs: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Maps every run with a non-zero update to a point in a plane, near to runs of similar direction.

    Returns:
        The points, and the share of the variance that the plane shows.
    """
    known = pairs[pairs["cosine"].notna()]
    names = list(dict.fromkeys([*known["run_a"], *known["run_b"]]))
    number = {name: place for place, name in enumerate(names)}
    cosines = np.eye(len(names))
    a, b = known["run_a"].map(number).to_numpy(dtype=int), known["run_b"].map(number).to_numpy(dtype=int)
    cosines[a, b] = cosines[b, a] = known["cosine"].to_numpy(dtype=float)
    if not names:
        return pd.DataFrame(columns=["run", "x", "y"]), float("nan")
    plane = mds(angles(cosines))
    return pd.DataFrame({"run": names, "x": plane.points[:, 0], "y": plane.points[:, 1]}), plane.kept
