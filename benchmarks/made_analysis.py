"""Synthetic analysis folders of any size: random values in the tables of a real analysis."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from losslens import measures
from losslens.analysis.repeats import MEASURES, arm_pairs, pairing, with_levels
from losslens.losses.presentation import builtin_presentations
from losslens.measures.comparison import PairGeometry, RunGeometry
from losslens.measures.tables import ComparedWeights, weight_tables

# The losses of arXiv 2606.23740.
METHODS = tuple(name for name, known in builtin_presentations().items() if known.place in range(1, 7))


def make_analysis(
    folder: Path,
    methods: Sequence[str] = METHODS,
    seeds: int = 1,
    rates: Sequence[float] = (1e-3,),
    settings: Sequence[str] = ("",),
    layers: int = 36,
    projections: Sequence[str] = ("q", "k", "v", "o"),
    top: int = 10,
    rank: int = 32,
    steps: int = 20,
) -> list[str]:
    """Writes the tables that the explorer reads, and returns the names of the runs.

    There is one arm for each combination of method, learning rate and settings.

    Args:
        folder: Folder of the analysis; created if it does not exist.
        methods: Names of the losses.
        seeds: Runs per arm.
        rates: Peak learning rates.
        settings: Settings that distinguish arms of one method and rate, such as `method.bias=0.1`.
        layers: Layers of the model.
        projections: Adapted projections of each layer.
        top: Principal angles per module and side.
        rank: Rank of the adapters.
        steps: Logged training steps.
    """
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(layers) for name in projections]
    runs = _runs(methods, seeds, rates, settings)
    names = runs["run"].tolist()
    pairs = list(itertools.combinations(names, 2))
    by_name = runs.set_index("run")
    lengths = {name: 0.05 * (1 + methods.index(by_name.loc[name, "method"])) for name in names}
    sizes = {name: _run(draw, len(modules), rank, length) for name, length in lengths.items()}
    compared = {(a, b): _pair(draw, sizes[a], sizes[b], layers, len(projections), top) for a, b in pairs}
    tables = weight_tables(
        ComparedWeights(
            modules, [(2560, 2560)] * len(modules), sizes, compared, top, same_a=dict.fromkeys(compared, True)
        )
    )
    runs = runs.merge(tables.runs, on="run").assign(accuracy=draw.uniform(0.5, 0.6, len(runs)), n=500)
    runs = runs.assign(ci_low=runs["accuracy"] - 0.04, ci_high=runs["accuracy"] + 0.04)
    base = {
        "run": "base-made",
        "method": "base",
        "benchmark": "arithmetic",
        "accuracy": 0.55,
        "ci_low": 0.51,
        "ci_high": 0.59,
        "n": 500,
    }
    _write(folder, "runs", pd.concat([pd.DataFrame([base]), runs.drop(columns="settings")]))
    _write(folder, "arms", _arms(draw, runs))
    _write(folder, "trajectories", _trajectories(draw, runs))
    own = [(a, b) for a, b in pairs if by_name.loc[a, "arm"] == by_name.loc[b, "arm"]]
    reference = [(a, b) for a, b in pairs if "sft" in (by_name.loc[a, "method"], by_name.loc[b, "method"])]
    reference = list(dict.fromkeys([*reference, *own]))
    curves, cka = _curves(draw, reference), _cka(draw, [*reference, *((name, "base-made") for name in names)], layers)
    _write(folder, "connectivity", curves)
    _write(folder, "cka", cka)
    measured = tables.pairs.merge(_measured(draw, pairs, set(reference), curves, cka), on=["run_a", "run_b"])
    arms, seed = (by_name[name].to_dict() for name in ("arm", "seed"))
    kinds = [pairing((seed[a], 0), (seed[b], 0), same_init=True) for a, b in pairs]
    measured = measured.assign(arm_a=measured["run_a"].map(arms), arm_b=measured["run_b"].map(arms), pairing=kinds)
    columns = dict.fromkeys([*measured, *MEASURES])
    _write(folder, "pairs", with_levels(measured.reindex(columns=list(columns)), MEASURES))
    of_arms = arm_pairs(measured, seed, list(dict.fromkeys(runs["arm"])))
    _write(folder, "arm_pairs", of_arms.merge(_accuracies(draw, of_arms), on=["arm_a", "arm_b"], how="left"))
    of_weights = [measure.name for measure in measures.weight_measures("more")]
    kinds_of = measured[["run_a", "run_b", "arm_a", "arm_b", "pairing"]]
    _write(
        folder, "layers", with_levels(tables.layers.merge(kinds_of, on=["run_a", "run_b"]), of_weights, by=["layer"])
    )
    tables.modules.to_parquet(folder / "modules.parquet")
    tables.run_modules.to_parquet(folder / "run_modules.parquet")
    _write(
        folder,
        "mds",
        pd.DataFrame({"run": names, "x": draw.normal(0, 30, len(names)), "y": draw.normal(0, 30, len(names))}),
    )
    _write(folder, "training", pd.concat([_training(draw, name, steps) for name in names]))
    manifest: dict[str, Any] = {
        "sweeps": ["made"],
        "bases": ["base-made"],
        "benchmark": "arithmetic",
        "settings": {"num_directions": top},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return names


def _runs(methods: Sequence[str], seeds: int, rates: Sequence[float], settings: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "run": f"{method}-{rate:g}{f'-{number}' * bool(number)}-s{seed}", "settings": own,
                "arm": f"{method}-{rate:g} {own}".rstrip(), "method": method, "lr": f"{rate:g}",
                "learning_rate": rate, "rank": 32, "model": "made", "seed": seed, "init_seed": 0,
                "benchmark": "arithmetic",
            }
            for method, rate, (number, own), seed in itertools.product(
                methods, rates, enumerate(settings), range(seeds)
            )
        ]
    )  # fmt: skip


def _arms(draw: np.random.Generator, runs: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for arm, own in runs.groupby("arm", sort=False):
        cosine, accuracy = draw.uniform(-0.2, 0.9), own["accuracy"].mean()
        row = {"arm": arm, "seeds": len(own), "norm": own["norm"].mean(), "norm_std": 0.01, "n": 500}
        row |= {name: own[name].iloc[0] for name in ("method", "lr", "learning_rate", "settings", "benchmark")}
        row |= {"effective_rank": own["effective_rank"].mean(), "cosine_to_sft": cosine, "sft": runs["arm"].iloc[0]}
        row |= {"cosine_to_sft_min": cosine - 0.02, "cosine_to_sft_max": cosine + 0.02}
        row |= {"cosine_repeat": 0.8, "cosine_to_sft_ceiling": 0.8, "cosine_to_sft_null": 0.02}
        row |= {"angle_min_left_to_sft": draw.uniform(10, 50), "barrier_chord_to_sft": 0.0, "cka_last_to_sft": 0.998}
        row |= {"accuracy": accuracy, "ci_low": accuracy - 0.04, "ci_high": accuracy + 0.04}
        row |= {"accuracy_min": own["accuracy"].min(), "accuracy_max": own["accuracy"].max()}
        rows.append(row)
    return pd.DataFrame(rows)


def _trajectories(draw: np.random.Generator, runs: pd.DataFrame) -> pd.DataFrame:
    columns = ["run", "method", "lr", "learning_rate", "settings", "seed", "init_seed"]
    return pd.concat(
        [
            runs[columns].assign(
                diverged=False, step=step, norm=runs["norm"] * step / 60, cosine_to_end=step / 60,
                cosine_to_sft=draw.uniform(-0.2, 0.9, len(runs)),
            )
            for step in (20, 40, 60)
        ]
    )  # fmt: skip


def _training(draw: np.random.Generator, run: str, steps: int) -> pd.DataFrame:
    step = np.arange(1, steps + 1)
    geometry = {"norm": np.sqrt(step), "effective_rank": 8 - step / steps, "cosine_to_sft": step / steps}
    return pd.DataFrame(
        {
            "run": run, "step": step, "loss": 2 / step + draw.uniform(0, 0.1, steps),
            "grad_norm": draw.uniform(0.5, 1, steps),
            **{f"geometry_{name}": values * draw.uniform(0.5, 1) for name, values in geometry.items()},
        }
    )  # fmt: skip


def _run(draw: np.random.Generator, modules: int, rank: int, length: float) -> RunGeometry:
    values = np.sort(draw.exponential(length, (modules, rank)))[:, ::-1]
    return RunGeometry(singular_values=values, drift=np.radians(np.sort(draw.uniform(0, 20, (modules, rank)))))


def _pair(
    draw: np.random.Generator, a: RunGeometry, b: RunGeometry, layers: int, projections: int, top: int
) -> PairGeometry:
    modules = layers * projections
    depth = np.repeat(np.linspace(draw.uniform(-0.2, 0.9), draw.uniform(-0.2, 0.9), layers), projections)
    cosines = np.clip(depth + draw.normal(0, 0.05, modules), -0.99, 0.99)
    norms = [np.sqrt(np.sum(run.singular_values**2, axis=1)) for run in (a, b)]
    angles = [np.radians(np.sort(draw.uniform(low, 90, (modules, top)))) for low in (15, 2)]
    agreement = draw.uniform(0, 1, (2, modules))
    # As if A was shared, so that the inputs of both updates span the same subspace.
    overlap = (norms[0] * norms[1]) ** 2
    return PairGeometry(cosines * norms[0] * norms[1], overlap, *angles, *agreement)


def _accuracies(draw: np.random.Generator, of_arms: pd.DataFrame) -> pd.DataFrame:
    apart = of_arms[of_arms["arm_a"] != of_arms["arm_b"]]
    low, difference, high = np.sort(draw.uniform(-0.1, 0.1, (3, len(apart))), axis=0)
    said = np.where(difference > 0, "better", "worse")
    return apart[["arm_a", "arm_b"]].assign(
        n=500, accuracy_diff=difference, diff_low=low, diff_high=high, p=0.01, p_holm=0.04, accuracy_verdict=said
    )


def _curves(draw: np.random.Generator, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    rows = []
    for a, b in pairs:
        start, end, hill = draw.uniform(0.05, 0.06, 3)
        for alpha in np.arange(11) / 10:
            loss = (1 - alpha) * start + alpha * end + 0.5 * hill * alpha * (1 - alpha)
            rows.append(
                {"run_a": a, "run_b": b, "alpha": alpha, "loss": loss, "loss_low": 0.9 * loss, "loss_high": 1.1 * loss}
            )
    return pd.DataFrame(rows)


def _cka(draw: np.random.Generator, pairs: Sequence[tuple[str, str]], layers: int) -> pd.DataFrame:
    rows = []
    for a, b in pairs:
        along = 1 - np.cumsum(draw.exponential(1e-4, layers + 1))
        for layer, value in zip(range(-1, layers), along, strict=True):
            rows.append(
                {"run_a": a, "run_b": b, "layer": layer, "cka_unbiased": value, "cka_without_outlier": value - 1e-4}
            )
    return pd.DataFrame(rows)


def _measured(
    draw: np.random.Generator,
    pairs: Sequence[tuple[str, str]],
    reference: set[tuple[str, str]],
    curves: pd.DataFrame,
    cka: pd.DataFrame,
) -> pd.DataFrame:
    by_curve, by_cka = dict(list(curves.groupby(["run_a", "run_b"]))), dict(list(cka.groupby(["run_a", "run_b"])))
    rows = []
    for a, b in pairs:
        low, difference, high = np.sort(draw.uniform(-0.1, 0.1, 3))
        row = {"run_a": a, "run_b": b, "accuracy_diff": difference, "diff_low": low, "diff_high": high}
        if (a, b) in reference:
            alphas, loss = (by_curve[a, b][name].to_numpy() for name in ("alpha", "loss"))
            chord, mean = loss[0] + alphas * (loss[-1] - loss[0]), (loss[0] + loss[-1]) / 2
            for form, baseline in (("chord", chord), ("mean", mean)):
                barrier = float(np.max(loss - baseline))
                row |= {
                    f"barrier_{form}": barrier,
                    f"barrier_{form}_low": 0.8 * barrier,
                    f"barrier_{form}_high": 1.2 * barrier,
                }
            values = by_cka[a, b]["cka_unbiased"]
            row |= {"cka_last": values.iloc[-1], "cka_min": values.min()}
            row |= {f"accuracy_mid{end}": draw.uniform(0.5, 0.6) for end in ("", "_a", "_b")}
            row["accuracy_mid_n"] = 100
        rows.append(row)
    return pd.DataFrame(rows)


def _write(folder: Path, name: str, table: pd.DataFrame) -> None:
    table.to_csv(folder / f"{name}.csv", index=False)
