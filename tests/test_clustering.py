"""PERMANOVA: by hand, against the analysis of variance, and under the null."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import f_oneway

from losslens.measures.clustering import permanova, smallest_p

pytestmark = pytest.mark.fast


def between(points: np.ndarray) -> np.ndarray:
    return cdist(points, points)


def test_by_hand() -> None:
    """Points 0 and 1, 4 and 5 on a line: SS_total = (1 + 16 + 25 + 9 + 16 + 1)/4 = 17, SS_within = ½ + ½ = 1.

    F = 16/1 over 1/2 = 32. Of the six ways to choose two of four, two separate them: p = 1/3.
    """
    found = permanova(between(np.array([[0.0], [1.0], [4.0], [5.0]])), ["a", "a", "b", "b"])
    assert found.pseudo_f == pytest.approx(32)
    assert found.explained == pytest.approx(16 / 17)
    assert found.p == pytest.approx(1 / 3, abs=0.02)
    # The other ways put 0 with 4 or 5: SS_within = 8 + 8 = 16 or 12.5 + 4.5 = 17.
    assert found.expected == pytest.approx((16 / 17 + 1 / 17 + 0) / 3, abs=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_of_numbers_it_is_the_analysis_of_variance(seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=15)
    groups = np.array(list("aaaabbbbbcccccc"))
    expected = f_oneway(*(values[groups == group] for group in "abc"))
    assert permanova(between(values[:, None]), groups.tolist()).pseudo_f == pytest.approx(expected.statistic)
    assert permanova(between(values[:, None]), groups.tolist()).p == pytest.approx(expected.pvalue, abs=0.06)


def test_p_is_that_of_all_permutations() -> None:
    rng = np.random.default_rng(5)
    distances, groups = between(rng.normal(size=(6, 3))), list("aabbbc")
    values = [permanova(distances, list(order), permutations=1).pseudo_f for order in permutations(groups)]
    observed = permanova(distances, groups)
    assert observed.p == pytest.approx(np.mean(np.array(values) >= observed.pseudo_f - 1e-9), abs=0.02)


def test_under_the_null_p_is_uniform() -> None:
    rng = np.random.default_rng(1)
    found = [permanova(between(rng.normal(size=(12, 4))), list("aaaabbbbcccc"), 199).p for _ in range(300)]
    assert np.mean(np.array(found) <= 0.05) < 0.09
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_neither_order_nor_names_matter() -> None:
    rng = np.random.default_rng(2)
    points, groups = rng.normal(size=(9, 2)), np.array(list("aaabbbccc"))
    order = rng.permutation(9)
    found, shuffled = permanova(between(points), groups), permanova(between(points[order]), groups[order])
    assert shuffled.pseudo_f == pytest.approx(found.pseudo_f)
    assert shuffled.p == pytest.approx(found.p, abs=0.02)


@pytest.mark.parametrize("groups", ["aaa", "abc"])
def test_groups_that_cannot_be_compared(groups: str) -> None:
    with pytest.raises(ValueError, match="at least two"):
        permanova(np.ones((3, 3)), list(groups))


def test_things_that_coincide() -> None:
    found = permanova(np.zeros((4, 4)), list("aabb"))
    assert np.isnan(found.explained)
    assert found.p == 1


@pytest.mark.parametrize(
    ("groups", "p"), [("aabb", 1 / 3), ("aaabbb", 1 / 10), ("aaaabb", 1 / 15), ("abbbbb", 1 / 6), ("aabbcc", 1 / 15)]
)
def test_the_smallest_p(groups: str, p: float) -> None:
    """Two of four: 6 ways, of which 2 are the same groups. Three of six: 20/2. Four of six: 15. Three pairs: 90/3!.

    The same by all permutations of the labels, counting those that leave the groups as they are.
    """

    def parted(labels: tuple[str, ...]) -> set[frozenset[int]]:
        return {frozenset(n for n, label in enumerate(labels) if label == group) for group in labels}

    drawn = [parted(labels) == parted(tuple(groups)) for labels in permutations(groups)]
    assert smallest_p(groups) == pytest.approx(p) == pytest.approx(np.mean(drawn))


def test_the_smallest_p_of_many_is_that_of_the_permutations() -> None:
    """Ten of twenty can be chosen in 92,378 ways up to exchange, but 99 random permutations show no less than 1/100."""
    assert smallest_p("a" * 10 + "b" * 10, permutations=99) == 0.01


def test_p_reaches_its_smallest_value() -> None:
    points = np.array([[0.0], [0.1], [0.2], [9.0], [9.1], [9.2], [9.3]])
    found = permanova(between(points), list("aaabbbb"))
    assert found.p_min == pytest.approx(1 / 35)
    assert found.p == pytest.approx(found.p_min, abs=0.006)
