"""Statistics against numbers worked out by hand or published."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import binomtest, multinomial, norm

from losslens.analysis.arm_accuracy import compare_arms
from losslens.evaluation.statistics import (
    bootstrap_difference,
    detectable_difference,
    equivalence,
    holm,
    mcnemar,
    sign_flip,
    verdict,
    wilson_interval,
)

pytestmark = pytest.mark.fast


def outcomes(b: int, c: int, both: int = 10) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * b + [False] * c + [True] * both
    second = [False] * b + [True] * c + [True] * both
    return np.array(first), np.array(second)


def of(b: int, c: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n problems in all."""
    return outcomes(b, c, n - b - c)


def test_wilson_interval() -> None:
    """(p + z²/2n ± z·√(p(1 − p)/n + z²/4n²))/(1 + z²/n) for 15 of 100, z = 1.959964."""
    z, p, n = 1.959964, 0.15, 100
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert wilson_interval(15, 100) == pytest.approx(expected, abs=1e-6)


def test_wilson_interval_at_the_ends() -> None:
    """0 of 10: from 0 to z²/(n + z²) = 0.2775."""
    assert wilson_interval(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1), abs=1e-5)


class TestMcNemar:
    def test_nine_against_one(self) -> None:
        """2·(C(10,0) + C(10,1))/2¹⁰ = 22/1024 = .021484; mid-p takes off C(10,1)/2¹⁰: 12/1024 = .011719."""
        test = mcnemar(*outcomes(9, 1))
        assert (test.b, test.c) == (9, 1)
        assert test.p == pytest.approx(22 / 1024)
        assert test.mid_p == pytest.approx(12 / 1024)
        assert mcnemar(*outcomes(1, 9)).p == test.p

    def test_eight_against_none(self) -> None:
        """2/2⁸ = .0078: the best that 9 against 1 right of 30 can give, above .05/15 = .0033."""
        assert mcnemar(*outcomes(8, 0)).p == pytest.approx(2 / 256)
        assert mcnemar(*outcomes(8, 0)).mid_p == pytest.approx(1 / 256)

    def test_no_difference(self) -> None:
        """b = c = 2: p = 1; mid-p 1 − ½·C(4,2)/2⁴ = 1 − 3/16. Nothing discordant: 1."""
        assert mcnemar(*outcomes(2, 2)).p == 1
        assert mcnemar(*outcomes(2, 2)).mid_p == pytest.approx(1 - 3 / 16)
        assert mcnemar(*outcomes(0, 0)).p == mcnemar(*outcomes(0, 0)).mid_p == 1

    @pytest.mark.parametrize(("b", "c"), [(59, 6), (7, 25), (3, 4)])
    def test_mid_p_by_its_definition(self, b: int, c: int) -> None:
        """2·[P(X < min) + ½·P(X = min)] of a binomial of b + c at ½."""
        n, least = b + c, min(b, c)
        mass = [math.comb(n, k) / 2**n for k in range(least + 1)]
        assert mcnemar(*outcomes(b, c)).mid_p == pytest.approx(2 * (sum(mass[:-1]) + mass[-1] / 2))
        assert mcnemar(*outcomes(b, c)).p == pytest.approx(2 * sum(mass))


def test_holm() -> None:
    """.01·4 = .04; .02·3 = .06; .03·2 = .06 (not below the one before); .04·1 → .06."""
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]).shape == (0,)


def test_bootstrap_difference() -> None:
    """A constant difference has no spread; one of ±1 in 400 problems has the normal one, 1.96·sd/√n."""
    ones = np.ones(50)
    assert bootstrap_difference(ones, ones * 0.5) == (0.5, 0.5)
    rng = np.random.default_rng(0)
    first, second = rng.random(400) < 0.6, rng.random(400) < 0.5
    difference = first.astype(float) - second
    low, high = bootstrap_difference(first, second)
    half = 1.96 * difference.std() / math.sqrt(400)
    assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.01)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert bootstrap_difference(first, second) == (low, high)


def test_how_often_the_bootstrap_interval_holds_the_difference() -> None:
    """500 comparisons of 200 problems, of which 10% and 5% are solved by one side only: 95%, give or take 3 points."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        drawn = rng.random(200)
        low, high = bootstrap_difference((drawn < 0.1).astype(float), (drawn > 0.95).astype(float))
        held += low <= 0.05 <= high
    assert 0.92 < held / 500 < 0.98


class TestEquivalence:
    def test_by_hand(self) -> None:
        """100 problems, of which the first alone solves 3 and the second alone 1. For m = .05: A = 200,
        B = −4 + 198·.05 = 5.9, C = −.05·.95 = −.0475, q = (√(34.81 + 38) − 5.9)/400 = .006582;
        z = (2 − 5)/√(100·(.013164 + .0475)) = −1.2180, p = .1116."""
        found = equivalence(*of(3, 1, 100), 0.05)
        assert found.p == pytest.approx(0.1116, abs=1e-4)
        assert equivalence(*of(1, 3, 100), 0.05) == found
        assert equivalence(*of(3, 1, 100), found.within).p == pytest.approx(0.05)
        assert 0.05 < found.within < 0.1

    @pytest.mark.parametrize(("b", "c", "n", "margin"), [(9, 4, 80, 0.1), (0, 7, 200, 0.05), (20, 31, 300, 0.02)])
    def test_against_the_likelihood(self, b: int, c: int, n: int, margin: float) -> None:
        """q maximises b·log(q + δ) + c·log q + (n − b − c)·log(1 − 2q − δ), by search; both sides."""
        scores = []
        for x, y in ((b, c), (c, b)):

            def unlikely(q: float, x: int = x, y: int = y) -> float:
                return -float(xlogy(x, q + margin) + xlogy(y, q) + xlogy(n - x - y, 1 - 2 * q - margin))

            q = minimize_scalar(unlikely, bounds=(1e-9, (1 - margin) / 2 - 1e-9), options={"xatol": 1e-10}).x
            scores.append((x - y - n * margin) / math.sqrt(n * (2 * q + margin - margin**2)))
        assert equivalence(*of(b, c, n), margin).p == pytest.approx(norm.cdf(max(scores)), rel=1e-3)

    def test_equal_answers_to_few_problems_are_not_equivalence(self) -> None:
        """q = 0, z = −√(nδ/(1 − δ)): ±5 points are shown from 1.645²·.95/.05 = 51.4 problems on."""
        assert equivalence(*of(0, 0, 51), 0.05).p > 0.05 > equivalence(*of(0, 0, 52), 0.05).p
        assert equivalence(*of(0, 0, 52), 0.05).within == pytest.approx(1.6448536**2 / (52 + 1.6448536**2))

    def test_opposites(self) -> None:
        assert equivalence(*of(20, 0, 20), 0.05).within == 1
        assert equivalence(*of(20, 0, 20), 0.05).p > 0.99

    @pytest.mark.parametrize(("n", "discordant"), [(100, 0.05), (200, 0.05), (200, 0.1), (500, 0.1)])
    def test_its_size_over_all_tables(self, n: int, discordant: float) -> None:
        """Exactly: of all tables that occur where the true difference is the margin, at most 5% pass."""
        only_first, only_second = (discordant + 0.05) / 2, (discordant - 0.05) / 2
        b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
        b, c = b[b + c <= n], c[b + c <= n]
        chance = multinomial.pmf(np.stack([b, c, n - b - c], axis=1), n, [only_first, only_second, 1 - discordant])
        likely = chance > 1e-7
        passes = [equivalence(*of(x, y, n), 0.05).p <= 0.05 for x, y in zip(b[likely], c[likely], strict=True)]
        assert chance[likely][passes].sum() <= 0.05

    def test_averages_are_taken_for_whole_problems(self) -> None:
        """Eight of 100 problems solved by one run of two more, four by one of two less: b = 4, c = 2."""
        shares = np.full(100, 0.5)
        first, second = shares.copy(), shares.copy()
        first[:8] = 1.0
        second[8:12] = 1.0
        assert equivalence(first, second, 0.05) == equivalence(*of(4, 2, 100), 0.05)

    @pytest.mark.parametrize(("rare", "noise"), [(0.05, 1 / 8), (0.05, 1 / 24), (0.0, 1 / 4)])
    def test_its_size_for_averages_over_runs(self, rare: float, noise: float) -> None:
        """Of 1,000 comparisons of 100 problems at a true difference of 5 points, at most 5% pass, and two standard
        errors: where a few problems differ by a whole answer and the rest by a little, either way."""
        rng = np.random.default_rng(0)
        passed = 0
        for _ in range(1000):
            whole = rng.random(100) < rare
            little = noise * rng.choice([-1, 1], 100) * (rng.random(100) < 0.5)
            little += 0.0 if rare else np.where(rng.random(100) < 0.2, noise, 0.0)
            passed += equivalence(np.where(whole, 1.0, little), np.zeros(100), 0.05).p <= 0.05
        assert passed / 1000 < 0.064


class TestVerdict:
    @pytest.mark.parametrize(
        ("difference", "p", "p_equivalence", "said"),
        [
            (0.1, 0.05, 0.9, "better"), (-0.1, 1.5e-4, 0.9, "worse"), (0.01, 0.3, 0.05, "equivalent"),
            (0.01, 0.3, 0.051, "cannot say"), (0.0, 1.0, 0.2, "cannot say"), (0.01, 0.01, 0.01, "better"),
        ],
    )  # fmt: skip
    def test_which_of_four(self, difference: float, p: float, p_equivalence: float, said: str) -> None:
        """A difference that is shown is one, however small: the margin it would pass stands beside it."""
        assert verdict(difference, p, p_equivalence) == said

    def test_each_kind_of_statement_is_corrected_by_itself(self) -> None:
        """Of three comparisons x and y answer alike: the smallest p of equivalence, three times that by Holm."""
        right = np.ones(200)
        wrong = np.r_[np.zeros(40), np.ones(160)]
        columns = {"x": right, "y": right, "base": wrong}
        table = compare_arms({name: pd.DataFrame({name: of}) for name, of in columns.items()}, None, 0.05)
        found = table.set_index(["arm_a", "arm_b"])
        assert found["accuracy_verdict"].tolist() == ["equivalent", "better", "better"]
        assert found["p_equivalence_holm"].iloc[0] == pytest.approx(3 * found["p_equivalence"].iloc[0])
        assert (found["equivalence_margin"] == 0.05).all()
        assert found["equivalent_within"].iloc[1] > 0.2


def test_several_samples_of_a_problem() -> None:
    """One of two right on each of six problems against none: b = 6, p = 2/2⁶."""
    test = mcnemar(np.full(6, 0.5), np.zeros(6))
    assert (test.b, test.c) == (6, 0)
    assert test.p == pytest.approx(2 / 64)


class TestSignFlip:
    def test_by_hand(self) -> None:
        """Differences 1, 1, 1: of the 8 ways to flip them two have a sum of 3 or −3."""
        assert sign_flip(np.array([1.0, 1.0, 1.0, 0.0]), np.array([0.0, 0.0, 0.0, 0.0])) == pytest.approx(2 / 8)

    @pytest.mark.parametrize(("b", "c"), [(9, 1), (40, 25), (7, 7)])
    def test_of_two_single_runs_it_is_mcnemars(self, b: int, c: int) -> None:
        """However many problems differ: of ±1 all ways to flip are counted by the binomial."""
        assert sign_flip(*(side.astype(float) for side in outcomes(b, c))) == pytest.approx(mcnemar(*outcomes(b, c)).p)

    @pytest.mark.parametrize("problems", [9, 10])
    def test_all_flips_are_counted(self, problems: int) -> None:
        """Of shares of two and three runs: by going through all ways to flip them."""
        rng = np.random.default_rng(problems)
        first, second = rng.integers(0, 4, problems) / 3, rng.integers(0, 3, problems) / 2
        signs = np.array(list(product((1, -1), repeat=problems)))
        sums = np.abs(signs @ (first - second))
        expected = np.mean(sums >= abs(np.sum(first - second)) - 1e-9)
        assert sign_flip(first, second) == pytest.approx(expected, abs=1e-12)

    def test_shares_without_a_common_denominator(self) -> None:
        """Shares with nothing in common: all signs are one, so two of 2¹² flips are as far from 0."""
        first = np.random.default_rng(0).random(12) / 2 + 0.1
        assert sign_flip(first, np.zeros(12)) == pytest.approx(2 / 2**12)

    @pytest.mark.slow
    def test_a_p_may_be_as_small_as_276_tests_ask_for(self) -> None:
        """23 arms of two runs and the base, one arm 72 points above the others: 9,999 flips gave .0552 after Holm."""
        rng = np.random.default_rng(0)
        shares = {f"arm {number}": np.full(100, 0.14) for number in range(23)}
        shares["arm 0"] = np.full(100, 0.86)
        outcomes = {
            arm: pd.DataFrame({run: (rng.random(100) < share).astype(float) for run in ("s0", "s1")})
            for arm, share in shares.items()
        }
        outcomes["base"] = pd.DataFrame({"base": (rng.random(100) < 0.14).astype(float)})
        found = compare_arms(outcomes, None, 0.05).set_index(["arm_a", "arm_b"])
        assert len(found) == 276
        assert set(found.loc["arm 0", "accuracy_verdict"]) == {"better"}
        assert found.loc[("arm 0", "base"), "p_holm"] < 1e-6

    def test_rounding_errors_are_not_differences(self) -> None:
        first, second = np.array([0.1 + 0.2] * 8), np.array([0.3] * 8)
        assert (first != second).all()
        assert sign_flip(first, second) == 1.0

    def test_an_average_of_runs_equals_a_single_run_of_the_same_accuracy(self) -> None:
        """Four runs that each flip 6% of a base's outcomes at the rates that keep 93%: McNemar's test finds a
        difference in nearly every trial, this one in about one of twenty."""
        rng = np.random.default_rng(0)
        found = {"mcnemar": 0, "flip": 0}
        for _ in range(60):
            base = rng.random(3000) < 0.93
            lost = 0.06 / 2 / 0.93
            won = 0.06 / 2 / 0.07
            runs = [np.where(base, rng.random(3000) >= lost, rng.random(3000) < won) for _ in range(4)]
            share = np.mean(runs, axis=0)
            found["mcnemar"] += mcnemar(share, base.astype(float)).p < 0.05
            found["flip"] += sign_flip(share, base.astype(float)) < 0.05
        assert found["mcnemar"] > 30
        assert found["flip"] <= 9  # 3 are expected


class TestDetectableDifference:
    def test_by_hand(self) -> None:
        """All of ten problems discordant: 2·(1 + 10)/2¹⁰ = .021 passes .05, 2·(1 + 10 + 45)/2¹⁰ = .109 does not, so
        nine must be on one side: q¹⁰ + 10·q⁹(1 − q) and the same of the other side are .8 together; δ = 2q − 1."""
        q = (1 + detectable_difference(10, 10, 0.05)) / 2
        r = 1 - q
        assert q**10 + 10 * q**9 * r + r**10 + 10 * r**9 * q == pytest.approx(0.8, abs=1e-5)

    def test_nothing_is_detectable_with_few_discordant_problems(self) -> None:
        """Five discordant problems on one side have p = 2/2⁵ = .06; all of six .03, but in 64 of 100 samples only."""
        assert math.isnan(detectable_difference(5, 5, 0.05))
        assert math.isnan(detectable_difference(0, 500, 0.05))
        assert math.isnan(detectable_difference(0, 0, 0.05))
        assert detectable_difference(6, 6, 0.05) == pytest.approx(2 * 0.8 ** (1 / 6) - 1, abs=1e-4)

    @pytest.mark.parametrize(("discordant", "n"), [(43, 500), (200, 1319), (900, 3000)])
    @pytest.mark.parametrize("tests", [1, 15])
    def test_near_the_normal_approximation(self, discordant: int, n: int, tests: int) -> None:
        """Connor (1987), solved for δ: √ψ·(z_α√n + z_β√(n − z_α² + z_β²))/(n + z_β²)."""
        a, b, share = norm.isf(0.05 / tests / 2), norm.ppf(0.8), discordant / n
        approximate = math.sqrt(share) * (a * math.sqrt(n) + b * math.sqrt(n - a**2 + b**2)) / (n + b**2)
        assert detectable_difference(discordant, n, 0.05 / tests) == pytest.approx(approximate, rel=0.04)

    @pytest.mark.slow
    def test_it_is_detected_in_eight_of_ten_samples(self) -> None:
        n, discordant, level = 500, 60, 0.05 / 28
        share, difference = discordant / n, detectable_difference(discordant, n, level)
        drawn = np.random.default_rng(0).multinomial(
            n, [(share + difference) / 2, (share - difference) / 2, 1 - share], size=2000
        )
        found = [binomtest(int(b), int(b + c)).pvalue <= level for b, c, _ in drawn]
        assert np.mean(found) == pytest.approx(0.8, abs=0.03)  # 0.009 is the standard error

    def test_it_grows_with_more_tests_and_fewer_problems(self) -> None:
        assert detectable_difference(60, 500, 0.05 / 28) > detectable_difference(60, 500, 0.05)
        assert detectable_difference(30, 250, 0.05) > detectable_difference(60, 500, 0.05)
