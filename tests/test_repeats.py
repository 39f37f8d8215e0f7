"""Two losses against each other and themselves: the rules by hand, the estimator on runs whose truth is known."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pytest

from losslens.analysis.repeats import (
    COLUMNS,
    MEASURES,
    arm_pairs,
    direction,
    level,
    pairing,
    repeat_table,
    with_levels,
)
from losslens.evaluation.statistics import jackknife_interval

NAN = float("nan")


def table(runs: dict[str, tuple[str, int, int]], values: dict[tuple[str, str], Any], null: float = 0.02) -> Any:
    """`arm_pairs` of runs (arm, seed, init_seed) and the measures of their pairs (a number is the cosine)."""
    rows = run_pairs(runs, values, null)
    arms = list(dict.fromkeys(arm for arm, *_ in runs.values()))
    return arm_pairs(rows, {run: seed for run, (_, seed, _) in runs.items()}, arms)


def run_pairs(
    runs: dict[str, tuple[str, int, int]], values: dict[tuple[str, str], Any], null: float = 0.02
) -> pd.DataFrame:
    rows = []
    for a, b in combinations(runs, 2):
        value = values.get((a, b), values.get((b, a)))
        if value is not None:
            (arm_a, *seeds_a), (arm_b, *seeds_b) = runs[a], runs[b]
            kind = pairing(tuple(seeds_a), tuple(seeds_b), seeds_a[1] == seeds_b[1])  # type: ignore[arg-type]
            given = value if isinstance(value, dict) else {"cosine": value}
            rows.append(
                {"run_a": a, "run_b": b, "arm_a": arm_a, "arm_b": arm_b, "pairing": kind, "cosine_null": null, **given}
            )
    return pd.DataFrame(rows).reindex(columns=["run_a", "run_b", "arm_a", "arm_b", "pairing", "cosine_null", *MEASURES])


def of(found: pd.DataFrame, a: str, b: str) -> pd.Series:
    return found.set_index(["arm_a", "arm_b"]).loc[(a, b)]


TWO = {"x0": ("x", 0, 0), "x1": ("x", 1, 0), "y0": ("y", 0, 0), "y1": ("y", 1, 0)}


class TestPairing:
    def test_what_two_runs_share(self) -> None:
        assert pairing((0, 0), (0, 0), same_init=True) == "same seeds"
        assert pairing((0, 0), (1, 0), same_init=True) == "same init"
        assert pairing((0, 0), (0, 1), same_init=False) == "same order"
        assert pairing((0, 0), (1, 1), same_init=False) == "other"
        assert pairing(None, (1, 1), same_init=None) == ""

    def test_runs_on_samples_of_their_own(self) -> None:
        """With one seed two of them share prompts and random numbers; one of them and a frozen one share nothing."""
        assert pairing((0, 0), (0, 0), same_init=True, own=(True, True)) == "same seeds"
        assert pairing((0, 0), (0, 0), same_init=True, own=(True, False)) == "same init"
        assert pairing((0, 0), (1, 0), same_init=True, own=(True, True)) == "same init"

    def test_runs_of_one_seed_do_not_count(self) -> None:
        """x0–y0 and x1–y1 met the same batches: (.3 + .5)/2 = .4 is the cosine, of two pairs, from .3 to .5."""
        found = table(TWO, {("x0", "y0"): 0.9, ("x1", "y1"): 0.9, ("x0", "y1"): 0.3, ("x1", "y0"): 0.5})
        row = of(found, "x", "y")
        assert row["cosine"] == pytest.approx(0.4)
        assert (row["pairing"], row["pairs"], row["cosine_min"], row["cosine_max"]) == ("same init", 2, 0.3, 0.5)

    def test_from_one_initial_adapter_before_two(self) -> None:
        runs = {**TWO, "y2": ("y", 2, 2)}
        row = of(table(runs, {("x0", "y1"): 0.3, ("x0", "y2"): 0.0, ("x0", "y0"): 0.9}), "x", "y")
        assert (row["pairing"], row["cosine"]) == ("same init", 0.3)

    def test_two_runs_of_one_seed_are_shown_without_a_ceiling(self) -> None:
        """Where nothing else was trained; x's own repeat is of another kind of pair and says nothing of it."""
        runs = {"x0": ("x", 0, 0), "x1": ("x", 1, 0), "y0": ("y", 0, 0)}
        only = {name: runs[name] for name in ("x0", "y0")}
        row = of(table(only, {("x0", "y0"): 0.9}), "x", "y")
        assert (row["pairing"], row["cosine"], row["cosine_verdict"]) == ("same seeds", 0.9, "too few seeds")
        assert np.isnan([row["cosine_ceiling"], row["cosine_relative"]]).all()
        row = of(table(runs, {("x0", "y0"): 0.9, ("x1", "y0"): 0.5, ("x0", "x1"): 0.8}), "x", "y")
        assert (row["pairing"], row["cosine"], row["repeats"]) == ("same init", 0.5, 1)
        assert np.isnan(row["cosine_ceiling"])

    def test_other_initial_adapters_have_ceilings_of_their_own(self) -> None:
        """x and y from two A each: ρ over A is .25 and .36, the ceiling √(.25·.36) = .3, not that over orders."""
        runs = {"x0": ("x", 0, 0), "x1": ("x", 1, 1), "y2": ("y", 2, 2), "y3": ("y", 3, 3)}
        values = {("x0", "x1"): 0.25, ("y2", "y3"): 0.36, ("x0", "y2"): 0.15, ("x1", "y3"): 0.15}
        row = of(table(runs, values), "x", "y")
        assert (row["pairing"], row["repeat_kind"]) == ("other", "order and start")
        assert (row["cosine_ceiling"], row["cosine_relative"]) == (pytest.approx(0.3), pytest.approx(0.5))

    def test_the_order_of_the_runs_does_not_matter(self) -> None:
        runs = {"y0": ("y", 0, 0), "x0": ("x", 0, 0), "y1": ("y", 1, 0), "x1": ("x", 1, 0)}
        row = of(table(runs, {("x0", "y1"): 0.3, ("x1", "y0"): 0.5}), "y", "x")
        assert (row["cosine"], row["pairs"]) == (pytest.approx(0.4), 2)


class TestLevels:
    def test_one_formula_a_kind_of_quantity(self) -> None:
        """Of cosines √(.64·.36) = .48, of barriers ½(.1 + .3) = .2, of angles ½(10 + 20) = 15."""
        own = {"cosine": (0.64, 0.36), "barrier_chord": (0.1, 0.3), "angle_min_left": (10.0, 20.0)}
        values = {("x0", "x1"): {m: a for m, (a, _) in own.items()}, ("y0", "y1"): {m: b for m, (_, b) in own.items()}}
        between = {"cosine": 0.24, "barrier_chord": 0.25, "angle_min_left": 30.0}
        row = of(table(TWO, {**values, ("x0", "y1"): between}), "x", "y")
        assert (row["cosine_ceiling"], row["cosine_relative"]) == (pytest.approx(0.48), pytest.approx(0.5))
        assert (row["barrier_chord_repeat"], row["barrier_chord_relative"]) == (pytest.approx(0.2), pytest.approx(0.05))
        assert row["angle_min_left_repeat"] == pytest.approx(15)
        assert "angle_min_left_relative" not in COLUMNS  # medians of angles have no law of attenuation
        assert (row["repeats"], row["repeat_kind"]) == (2, "order")

    @pytest.mark.parametrize(("rho", "null"), [(0.19, 0.02), (-0.3, 0.02), (0.4, 0.5), (0.0, NAN)])
    def test_no_ceiling_where_a_loss_is_not_like_itself(self, rho: float, null: float) -> None:
        """Never √(max(ρ, 0)·…) = 0, which every positive cosine passes."""
        found = level(("cosine",), np.array([rho]), np.array([0.9]), np.array([null]), np.array([0.02]))
        assert np.isnan(found).all()

    def test_beyond_the_ceiling_is_not_clipped(self) -> None:
        row = of(table(TWO, {("x0", "x1"): 0.5, ("y0", "y1"): 0.5, ("x0", "y1"): 0.6}), "x", "y")
        assert row["cosine_relative"] == pytest.approx(1.2)

    def test_what_each_shows_with_itself_is_of_the_kind_of_the_pair(self) -> None:
        """x and y share no A, so .3 and .4 over A make the ceiling, though x has .9 with itself in another order."""
        runs = {"x0": ("x", 0, 0), "x1": ("x", 1, 0), "x2": ("x", 2, 1), "y3": ("y", 3, 3), "y4": ("y", 4, 4)}
        values = {("x0", "x1"): 0.9, ("x0", "x2"): 0.3, ("x1", "x2"): 0.3, ("y3", "y4"): 0.4, ("x0", "y3"): 0.1}
        found = table(runs, values)
        row = of(found, "x", "y")
        assert (row["cosine_repeat_a"], row["cosine_repeat_b"]) == (pytest.approx(0.3), pytest.approx(0.4))
        assert (row["repeat_kind"], of(found, "x", "x")["repeat_kind"]) == ("order and start", "order")

    def test_the_seeds_and_kind_of_losses_without_repeats(self) -> None:
        """Seed 0 of the one and seed 1 of the other are no repeat; five seeds and one are one seed."""
        row = of(table({"x0": ("x", 0, 0), "y1": ("y", 1, 0)}, {("x0", "y1"): 0.5}), "x", "y")
        assert (row["repeats"], row["repeat_kind"]) == (1, "")
        runs = {"y9": ("y", 9, 0), **{f"x{seed}": ("x", seed, 0) for seed in range(5)}}
        found = table(runs, dict.fromkeys(combinations(runs, 2), 0.5))
        row = of(found, "y", "x")
        assert (row["pairs"], row["repeats"], row["repeat_kind"]) == (5, 1, "")
        assert np.isnan(row["cosine_repeat_a"])
        assert row["cosine_repeat_b"] == pytest.approx(0.5)

    def test_a_loss_and_itself(self) -> None:
        row = of(table(TWO, {("x0", "x1"): 0.7}), "x", "x")
        assert (row["cosine"], row["repeat_kind"], row["repeats"], row["cosine_verdict"]) == (0.7, "order", 2, "")
        assert np.isnan(row["cosine_ceiling"])

    def test_beside_pairs_of_runs(self) -> None:
        """Only beside those of two losses at different seeds; layer by layer, too."""
        values = {("x0", "x1"): 0.64, ("y0", "y1"): 0.36, ("x0", "y0"): 0.9, ("x0", "y1"): 0.3, ("x1", "y0"): 0.3}
        rows = run_pairs(TWO, values)
        both = pd.concat([rows.assign(layer=0), rows.assign(layer=1, cosine=1.0)], ignore_index=True)
        found = with_levels(both, ["cosine"], by=["layer"]).set_index(["layer", "run_a", "run_b"])["cosine_ceiling"]
        assert found[0, "x0", "y1"] == found[0, "x1", "y0"] == pytest.approx(0.48)
        assert found[1, "x0", "y1"] == pytest.approx(1.0)
        assert np.isnan([found[0, "x0", "y0"], found[0, "x0", "x1"]]).all()

    def test_the_repeats_of_each_arm(self) -> None:
        runs = {"x0": ("x", 0, 0), "x1": ("x", 1, 0), "x2": ("x", 0, 2)}
        rows = run_pairs(runs, {("x0", "x1"): 0.8, ("x0", "x2"): 0.1, ("x1", "x2"): 0.05})
        seeds = {run: seed for run, (_, seed, _) in runs.items()}
        found = repeat_table(rows, seeds, {"x": {"method": "sft"}}, {"x": "sft"}).set_index("repeat_kind")
        assert found["cosine"].to_dict() == {"order": 0.8, "start": 0.1, "order and start": 0.05}
        assert found.loc["order", ["arm", "again", "method", "repeats"]].tolist() == ["x", "x", "sft", 2]

    def test_a_loss_on_other_rollouts_is_a_repeat_on_other_data(self) -> None:
        """Of one A: .4 and .2, whatever the order; another loss is none."""
        runs = {"x0": ("x", 0, 0), "o0": ("x on other", 0, 0), "o1": ("x on other", 1, 0), "y0": ("y", 0, 0)}
        rows = run_pairs(runs, {("x0", "o0"): 0.4, ("x0", "o1"): 0.2, ("x0", "y0"): 0.9, ("o0", "y0"): 0.9})
        facts = {arm: {"method": "sft"} for arm in ("x", "x on other", "y")}
        seeds = {run: seed for run, (_, seed, _) in runs.items()}
        found = repeat_table(rows, seeds, facts, {"x": "sft", "x on other": "sft", "y": "dpo"})
        assert found[["arm", "again", "repeat_kind", "pairs"]].to_numpy().tolist() == [["x", "x on other", "data", 2]]
        assert found["cosine"].item() == pytest.approx(0.3)
        assert found["repeats"].item() == 1  # of x

    def test_runs_on_two_rollouts_that_lie_among_each_other(self) -> None:
        """x0, o0, x1, o1: x0–o1 and o0–x1 are pairs of the same two arms."""
        runs = {"x0": ("x", 0, 0), "o0": ("o", 0, 0), "x1": ("x", 1, 0), "o1": ("o", 1, 0)}
        rows = run_pairs(runs, dict.fromkeys(combinations(runs, 2), 0.4))
        seeds = {run: seed for run, (_, seed, _) in runs.items()}
        found = repeat_table(rows, seeds, {arm: {"method": "sft"} for arm in "xo"}, {"x": "sft", "o": "sft"})
        of_data = found[found["repeat_kind"] == "data"]
        assert of_data[["arm", "again", "pairs", "repeats"]].to_numpy().tolist() == [["x", "o", 4, 2]]


class TestVerdict:
    @pytest.mark.parametrize(
        ("value", "own", "interval", "said"),
        [
            (0.82, (0.82, 0.83), (0.97, 1.02), "one loss"),
            (0.82, (0.82, 0.83), (0.8, 1.02), "related"),  # holds 1, and is too wide to say that it is 1
            (0.68, (0.82, 0.83), (0.74, 0.91), "related"),
            (0.21, (0.82, 0.63), (-0.06, 0.65), "too noisy to say"),
            (-0.1, (0.82, 0.99), (-0.16, -0.07), "opposed"),
            (0.02, (0.82, 0.99), (0.01, 0.03), "nothing in common"),
            (0.02, (0.82, 0.99), (-0.5, 0.5), "nothing in common"),  # before what the interval says
            (0.02, (0.82, 0.99), (NAN, NAN), "nothing in common"),  # and before two seeds
            (0.9, (0.6, 0.7), (1.3, 1.45), "related"),  # beyond 1, and does not hold it
            (0.38, (0.19, 0.9), (NAN, NAN), "too noisy to say"),
            (NAN, (0.82, 0.83), (NAN, NAN), ""),
            (0.38, (0.82, NAN), (NAN, NAN), "too few seeds"),
            (0.38, (0.82, 0.83), (NAN, NAN), "too few seeds"),
        ],
    )
    def test_rules(self, value: float, own: Any, interval: Any, said: str) -> None:
        assert direction(value, 0.03, own, (0.03, 0.03), interval) == said

    def test_within_its_own_null(self) -> None:
        assert direction(0.38, 0.03, (0.3, 0.9), (0.35, 0.03), (0.5, 0.6)) == "too noisy to say"

    def test_three_seeds_and_ten_steps(self) -> None:
        """GRPO .382 beside a repeat of −.04 at three seeds once "could not be told from SFT"."""
        runs = {f"{arm}{seed}": (arm, seed, 0) for arm in ("sft", "grpo") for seed in range(3)}
        values = {
            (a, b): 0.382 if runs[a][0] != runs[b][0] else 0.5 if runs[a][0] == "sft" else -0.04
            for a, b in combinations(runs, 2)
        }
        row = of(table(runs, values), "sft", "grpo")
        assert row["cosine_verdict"] == "too noisy to say"
        assert np.isnan([row["cosine_ceiling"], row["cosine_relative"], row["cosine_low"]]).all()


class TestJackknife:
    def test_by_hand(self) -> None:
        """.9, 1.0 and 1.1 without each: √(⅔·.02) = .1155, t₂ = 4.303, so 1 ± .497; two units give none."""
        low, high = jackknife_interval(np.array([1.0]), np.array([[0.9], [1.0], [1.1]]), 3)
        assert (low[0], high[0]) == (pytest.approx(1 - 0.4968, abs=1e-4), pytest.approx(1 + 0.4968, abs=1e-4))
        assert np.isnan(jackknife_interval(np.array([1.0]), np.ones((2, 1)), 2)).all()

    @pytest.mark.parametrize("apart", [0, 100])
    def test_three_seeds_against_twenty(self, apart: int) -> None:
        """t of the three, 4.303: with that of twenty, 2.093, the interval would be half as wide."""
        rng = np.random.default_rng(0)
        runs = {f"x{seed}": ("x", seed, 0) for seed in range(3)}
        runs |= {f"y{seed}": ("y", seed + apart, 0) for seed in range(20)}
        values = {(a, b): (0.5 if a[0] != b[0] else 0.8) + rng.normal(0, 0.02) for a, b in combinations(runs, 2)}
        row = of(table(runs, values), "x", "y")
        seeds = [*range(3), *range(apart, apart + 20)] if apart else range(20)

        def mean(left_out: int | None, arms: str) -> float:
            kept = [
                value
                for (a, b), value in values.items()
                if a[0] + b[0] == arms and runs[a][1] != runs[b][1] and left_out not in (runs[a][1], runs[b][1])
            ]
            return float(np.mean(kept))

        without = [mean(seed, "xy") / np.sqrt(mean(seed, "xx") * mean(seed, "yy")) for seed in seeds]
        n = len(without)
        half = 4.3027 * np.sqrt((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2))
        assert row["repeats"] == 3
        assert (row["cosine_high"] - row["cosine_low"]) / 2 == pytest.approx(half, rel=1e-4)

    def test_without_one_seed_neither_is_like_itself(self) -> None:
        """Both ρ are −.1 without seed 0: their product is above 0, but makes no ceiling."""
        runs = {f"{arm}{seed}": (arm, seed, 0) for arm in "xy" for seed in range(3)}
        values = {(a, b): 0.4 if a[0] != b[0] else 0.8 if "0" in a + b else -0.1 for a, b in combinations(runs, 2)}
        row = of(table(runs, values), "x", "y")
        assert row["cosine_relative"] == pytest.approx(0.8)
        assert np.isnan([row["cosine_low"], row["cosine_high"]]).all()
        assert row["cosine_verdict"] == "too noisy to say"

    def test_each_seed_goes_with_all_its_runs(self) -> None:
        """Ratios without seed 0, 1, 2: between .6, .4 and .5 of ceilings of .8."""
        runs = {f"{arm}{seed}": (arm, seed, 0) for arm in "xy" for seed in range(3)}
        between = {frozenset((1, 2)): 0.6, frozenset((0, 2)): 0.4, frozenset((0, 1)): 0.5}
        values = {
            (a, b): 0.8 if a[0] == b[0] else between.get(frozenset((int(a[1]), int(b[1]))))
            for a, b in combinations(runs, 2)
        }
        row = of(table(runs, values), "x", "y")
        low, high = jackknife_interval(np.array([0.625]), np.array([[0.75], [0.5], [0.625]]), 3)
        assert row["cosine_relative"] == pytest.approx(0.625)
        assert (row["cosine_low"], row["cosine_high"]) == (pytest.approx(low[0]), pytest.approx(high[0]))


def simulated(rho: float, truth: float, seeds: int, draw: np.random.Generator, shared: float = 0.0) -> pd.Series:
    """Two losses of ‖mean‖ = 1 whose mean updates have the cosine `truth`, in ℝ⁴⁰⁰, each run with noise of its own.

    Args:
        rho: What each has with itself.
        truth: The ratio to be found.
        seeds: Runs of each.
        draw: The generator.
        shared: The share of the noise's variance that runs of one seed have in common.
    """
    d = 400
    means = np.zeros((2, d))
    means[0, 0], means[1, 0], means[1, 1] = 1.0, truth, np.sqrt(1 - truth**2)
    sigma = np.sqrt((1 / rho - 1) / d)
    common = draw.normal(0, sigma, (seeds, d))
    runs, updates = {}, {}
    for arm, mean in zip("xy", means, strict=True):
        for seed in range(seeds):
            runs[f"{arm}{seed}"] = (arm, seed, 0)
            noise = np.sqrt(shared) * common[seed] + np.sqrt(1 - shared) * draw.normal(0, sigma, d)
            updates[f"{arm}{seed}"] = mean + noise
    unit = {name: update / np.linalg.norm(update) for name, update in updates.items()}
    cosines = {(a, b): float(unit[a] @ unit[b]) for a, b in combinations(runs, 2)}
    one_seed = np.mean([cosine for (a, b), cosine in cosines.items() if runs[a][1] == runs[b][1]])
    return pd.concat([of(table(runs, cosines), "x", "y"), pd.Series({"one_seed": one_seed})])


@pytest.mark.parametrize(("rho", "truth", "seeds"), [(0.8, 1.0, 3), (0.5, 0.6, 3), (0.3, 0.6, 4)])
def test_the_ratio_and_its_interval_on_runs_whose_truth_is_known(rho: float, truth: float, seeds: int) -> None:
    """Also where runs of one seed share half their noise: over 50 draws unbiased, and 95% intervals cover 90 to 100."""
    draw = np.random.default_rng(0)
    rows = pd.DataFrame([simulated(rho, truth, seeds, draw, shared=0.5) for _ in range(50)])
    assert rows["cosine_relative"].mean() == pytest.approx(truth, abs=0.02)
    assert rows["cosine_ceiling"].mean() == pytest.approx(rho, abs=0.02)
    assert ((rows["cosine_low"] <= truth) & (truth <= rows["cosine_high"])).mean() >= 0.9
    # Pairs of one seed read too high by what they share: truth·ρ + ½(1 − ρ).
    assert rows["one_seed"].mean() == pytest.approx(truth * rho + (1 - rho) / 2, abs=0.02)
