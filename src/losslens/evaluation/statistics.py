"""Statistics of right and wrong answers. Everything is paired on the problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import irfft, next_fast_len
from scipy.optimize import brentq
from scipy.stats import binom, binomtest
from scipy.stats import t as student
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

# Shares are compared as multiples of 1/120, or of a larger one.
_FINEST = 120


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


def verdict(difference: float, differing: int, p_holm: float, tests: int, level: float = 0.05) -> str:
    """What a comparison says: `better`, `worse`, `not significant`, `underpowered` or `same answers`.

    Underpowered: so few problems tell the two apart that no outcome of them, or none with a single contrary problem,
    could have passed Holm's first threshold level/tests: of m problems the exact p of (m − 1, 1), 2·(1 + m)/2ᵐ, is
    above it. Then nothing is said about a difference.

    Args:
        difference: Of the two means.
        differing: Problems on which the two are not equal.
        p_holm: The corrected p.
        tests: How many tests the family has.
        level: Of the family.
    """
    if differing == 0:
        return "same answers"
    if p_holm <= level:
        return "better" if difference > 0 else "worse"
    return "underpowered" if 2 * (1 + differing) / 2.0**differing > level / tests else "not significant"


@lru_cache(maxsize=4096)
def detectable_difference(discordant: int, n: int, level: float, power: float = 0.8) -> float:
    """The smallest difference of two accuracies that McNemar's exact test would find in `power` of such samples.

    Of n problems each is discordant with the probability ψ that was seen, (b + c)/n, and then right for the better run
    with q = (1 + δ/ψ)/2, δ being the difference of the accuracies. The test finds it where the exact p of b against
    m − b, 2·P(Bin(m, ½) ≥ max(b, m − b)), is at most `level`. Its power is

        Σ_m P(Bin(n, ψ) = m)·[P(Bin(m, q) ≤ k_m) + P(Bin(m, q) ≥ m − k_m)],

    k_m the largest k with 2·P(Bin(m, ½) ≤ k) ≤ level. It rises with δ, so the δ at which it is `power` is found by
    root finding. It is the exact form of Connor (1987), whose normal approximation is
    δ = √ψ·(z_α·√n + z_β·√(n − z_α² + z_β²))/(n + z_β²).

    Args:
        discordant: b + c.
        n: Problems.
        level: Of the test: of several, Holm's first threshold.
        power: How often it is to be found.

    Returns:
        NaN where no difference would be: with disagreement this rare, not even one that is all on one side.
    """
    share = discordant / n if n else 0.0
    spread = 8 * np.sqrt(n * share * (1 - share)) + 1
    counts = np.arange(max(0, int(discordant - spread)), min(n, int(discordant + spread) + 1) + 1)
    weights = binom.pmf(counts, n, share)
    # ppf gives the smallest k whose P(X ≤ k) reaches level/2; wanted is the largest that does not exceed it.
    critical = binom.ppf(level / 2, counts, 0.5)
    critical -= binom.cdf(critical, counts, 0.5) > level / 2

    def found(difference: float) -> float:
        q = (1 + difference / share) / 2
        either = binom.cdf(critical, counts, q) + binom.sf(counts - critical - 1, counts, q)
        return float(np.sum(weights * np.where(critical < 0, 0.0, either)))

    if share == 0 or found(share) < power:
        return float("nan")
    return float(brentq(lambda difference: found(difference) - power, 0.0, share, xtol=1e-6))


def sign_flip(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """The two-sided p of mean(first) = mean(second), flipping the signs of the paired differences (Fisher 1935).

    For outcomes that are averages over several runs: McNemar's test would count a problem that one run in four
    misses as much as one that all miss, and find a difference of an average of runs and a single one where there is
    none.

    All flips count, so that p may be as small as Holm's correction of many tests asks for. Shares of r samples are
    multiples of 1/r, so the flipped sum is one of few numbers, and its distribution an inverse Fourier transform of
    Π cos(πkw/N) over the differences w, good to about 10⁻¹³. Where the differences are multiples of nothing as large as
    1/120, they are rounded to it; that leaves the test exact, since rounding minds no sign.

    Args:
        first: Each problem's share right, shape (problems,).
        second: The same problems of the other side, averaged over however many runs.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    grid = next(
        (g for g in range(1, _FINEST) if np.abs(g * difference - np.rint(g * difference)).max() < 1e-6), _FINEST
    )
    weights = np.rint(grid * difference).astype(int)
    weights = weights[weights != 0]
    if np.unique(np.abs(weights)).size < 2:  # then it is the sign test, McNemar's of single answers
        return float(binomtest(int(np.sum(weights > 0)), weights.size).pvalue) if weights.size else 1.0
    sizes, counts = np.unique(np.abs(weights), return_counts=True)
    total, seen = int(sizes @ counts), abs(int(weights.sum()))
    length = next_fast_len(total + 1, real=True)
    frequencies = np.arange(length // 2 + 1)
    spectrum = np.exp(-1j * np.pi * (frequencies * total % (2 * length)) / length)
    for size, count in zip(sizes, counts, strict=True):
        spectrum *= np.cos(np.pi * frequencies * size / length) ** count
    chances = irfft(spectrum, length)  # of each sum of the differences that are flipped upwards
    tail = 2 * float(np.sum(chances[: (total - seen) // 2 + 1]))
    return min(1.0, max(tail, float(2.0 ** (1 - weights.size))))


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
    means = _draws(len(difference), resamples, seed) @ difference / len(difference)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(n: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each of n problems is drawn in each bootstrap sample, shape (resamples, n); the same for every pair."""
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n).astype(np.float64)


def jackknife_interval(
    estimate: NDArray[np.float64], without: NDArray[np.float64], fewest: int, share: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The interval estimate ± t_{m−1}·√((n − 1)/n·Σ(θ₍ᵢ₎ − θ̄)²) (Tukey 1958), NaN where it is not defined.

    Args:
        estimate: Of all n units, shape (estimates,).
        without: The same without each of them, shape (n, estimates).
        fewest: m, the units of the side that has fewest: 20 seeds of the one loss do not tell how the other varies.
        share: How often it is to hold the truth.
    """
    n = len(without)
    if fewest < 3:  # of two units the one without the other has nothing to be compared with
        nothing = np.full_like(estimate, np.nan)
        return nothing, nothing
    spread = np.sqrt((n - 1) / n * np.sum((without - without.mean(axis=0)) ** 2, axis=0))
    half = student.ppf((1 + share) / 2, fewest - 1) * spread
    return estimate - half, estimate + half
