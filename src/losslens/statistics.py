"""Statistics of right and wrong answers. Everything is paired on the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, permutation_test
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two runs on the same problems.

    Attributes:
        b: Problems that only the first run has right (of several samples: more often right).
        c: Problems that only the second run has right.
        p: Exact two-sided p: binomial, b of b + c at ½.
        mid_p: The same with half the weight on the observed table (Lancaster 1961; Fagerland et al. 2013).
    """

    b: int
    c: int
    p: float
    mid_p: float


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share of `right` in `n` (Wilson 1927)."""
    low, high = proportion_confint(right, n, alpha=0.05, method="wilson")
    return float(low), float(high)


def mcnemar(first: NDArray[np.float64], second: NDArray[np.float64]) -> McNemar:
    """McNemar's test (1947) of two aligned arrays of outcomes, shape (problems,).

    Where an outcome is the share of several samples that are right, b and c count the problems on which the first, or
    the second, has the larger share: the sign test, which McNemar's is for single samples.
    """
    b, c = int(np.sum(first > second)), int(np.sum(first < second))
    p = float(statsmodels_mcnemar([[0, b], [c, 0]], exact=True).pvalue) if b + c else 1.0
    # Twice the smaller tail counts the observed table once; mid-p counts it half.
    mid_p = p - float(binom.pmf(min(b, c), b + c, 0.5)) if b != c else 1 - float(binom.pmf(b, b + c, 0.5)) / 2
    return McNemar(b, c, p, min(1.0, mid_p) if b + c else 1.0)


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Holm's step-down correction (1979) over one family of p values, in their order."""
    return multipletests(p_values, method="holm")[1] if len(p_values) else np.zeros(0)


def verdict(test: McNemar, p_holm: float, tests: int, level: float = 0.05) -> str:
    """What a comparison says: `a better`, `b better`, `not significant`, `underpowered` or `same answers`.

    Underpowered: so few problems tell the two runs apart that no outcome of them, or none with a single contrary
    problem, could have passed Holm's first threshold level/tests: the exact p of (b + c − 1, 1), 2·(1 + b + c)/2ᵇ⁺ᶜ, is
    above it. Then nothing is said about a difference.
    """
    discordant = test.b + test.c
    if discordant == 0:
        return "same answers"
    if p_holm <= level:
        return "a better" if test.b > test.c else "b better"
    return "underpowered" if 2 * (1 + discordant) / 2.0**discordant > level / tests else "not significant"


def sign_flip(first: NDArray[np.float64], second: NDArray[np.float64], resamples: int = 9999, seed: int = 0) -> float:
    """The two-sided p of mean(first) = mean(second), flipping the signs of the paired differences (Fisher 1935).

    For outcomes that are averages over several runs: McNemar's test would count a problem that one run in four
    misses as much as one that all miss, and find a difference of an average of runs and a single one where there is
    none.

    Args:
        first: Each problem's share right, shape (problems,).
        second: The same problems of the other side, averaged over however many runs.
        resamples: Random flips, where not all of them are few enough to go through.
        seed: Of the generator.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    difference = difference[np.abs(difference) > 1e-9]  # averages of the same outcomes may differ by rounding
    if difference.size < 2:  # of one difference, either sign is as far from 0
        return 1.0
    test = permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=resamples, rng=seed, batch=1000, vectorized=True
    )
    return float(test.pvalue)


def bootstrap_difference(
    first: NDArray[np.float64], second: NDArray[np.float64], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of mean(first) − mean(second), resampling problems.

    Args:
        first: Each problem's outcome, averaged over its samples, so that they stay together; shape (problems,).
        second: The same problems of the other run.
        resamples: Bootstrap samples.
        seed: Of the generator.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.percentile(difference[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
