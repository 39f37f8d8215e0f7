"""Statistics of correct and incorrect answers, paired by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Differences of shares are represented as multiples of 1/120, or of a larger unit fraction.
_FINEST = 120


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two runs on the same problems.

    Attributes:
        b: Problems that only the first run solves (with several samples: solves more often).
        c: Problems that only the second run solves.
        p: Exact two-sided p value: binomial test of b in b + c with probability ½.
        mid_p: Mid-p value: the observed table has half the weight (Lancaster 1961; Fagerland et al. 2013).
    """

    b: int
    c: int
    p: float
    mid_p: float


def wilson_interval(right: float, n: int) -> tuple[float, float]:
    """Computes the 95% Wilson interval of the proportion `right`/`n` (Wilson 1927)."""
    from statsmodels.stats.proportion import (
        proportion_confint,  # an extra: who compares adapters alone has no accuracies
    )

    low, high = proportion_confint(right, n, alpha=0.05, method="wilson")
    return float(low), float(high)


def mcnemar(first: NDArray[np.float64], second: NDArray[np.float64]) -> McNemar:
    """Computes McNemar's test (1947) of two aligned arrays of outcomes, shape (problems,).

    If outcomes are shares of correct samples, b and c count the problems on which the first or second run has the
    larger share; this is the sign test, of which McNemar's test is the case of single samples.
    """
    from scipy.stats import binom  # slow to import
    from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

    b, c = int(np.sum(first > second)), int(np.sum(first < second))
    p = float(statsmodels_mcnemar([[0, b], [c, 0]], exact=True).pvalue) if b + c else 1.0
    # p is twice the smaller tail, which includes the observed table fully; mid-p includes half of it.
    mid_p = p - float(binom.pmf(min(b, c), b + c, 0.5)) if b != c else 1 - float(binom.pmf(b, b + c, 0.5)) / 2
    return McNemar(b, c, p, min(1.0, mid_p) if b + c else 1.0)


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Applies Holm's step-down correction (1979) to a family of p values; keeps their order."""
    if not len(p_values):
        return np.zeros(0)
    from statsmodels.stats.multitest import multipletests

    corrected: NDArray[np.float64] = multipletests(p_values, method="holm")[1]
    return corrected


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of a difference of means, paired by problem (Schuirmann 1987).

    Attributes:
        p: p value of the hypothesis that the difference is at least the margin, in either direction.
        within: The smallest margin at which p ≤ 5%: the end of the 90% interval that is farther from 0.
    """

    p: float
    within: float


def equivalence(first: NDArray[np.float64], second: NDArray[np.float64], margin: float) -> Equivalence:
    """Tests whether two means differ by less than `margin`, with the score test of Tango (1998).

    Of n problems, b are solved by the first side only and c by the second only. For a difference of δ the score is

        z(δ) = (b − c − nδ)/√(n·(2q + δ(1 − δ))),    q = (√(B² − 4AC) − B)/2A,
        A = 2n,    B = −b − c + (2n − b + c)δ,    C = −cδ(1 − δ),

    where q is the likeliest share of problems that only the second side solves. p is Φ(z(m)), or the same with the two
    sides exchanged if that is larger. How often it passes wrongly: docs/reference/measures.md.

    Averages over several runs differ by shares w of a problem; b and c are then the sums Σw⁺ and Σw⁻. That takes each
    share for as many whole problems, which overstates the spread: the test is conservative.

    Args:
        first: Share of correct samples per problem, averaged over any number of runs, shape (problems,).
        second: The same for the other side, shape (problems,).
        margin: The margin m, a share.
    """
    from scipy.optimize import brentq  # slow to import
    from scipy.stats import norm  # slow to import

    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n, total = len(difference), float(np.abs(difference).sum())
    net = abs(float(difference.sum()))
    # Of the two sides the one that solves more is nearer to the margin.
    b, c, mean = (total + net) / 2, (total - net) / 2, net / n

    def p(of: float) -> float:
        if of == mean:  # the score is 0 there, or 0/0
            return 0.5
        return float(norm.cdf(_score(b, c, n, of))) if of < 1 else 0.0

    within = float(brentq(lambda of: p(of) - 0.05, mean, 1)) if mean < 1 else 1.0
    return Equivalence(p(margin), within)


def _score(b: float, c: float, n: int, difference: float) -> float:
    """Returns Tango's score of a difference above 0 and below 1."""
    spread = difference * (1 - difference)
    linear = -b - c + (2 * n - b + c) * difference
    share = (np.sqrt(linear**2 + 8 * n * c * spread) - linear) / (4 * n)
    return float((b - c - n * difference) / np.sqrt(n * (2 * share + spread)))


def verdict(difference: float, p_holm: float, p_equivalence_holm: float, level: float = 0.05) -> str:
    """Classifies a comparison as `better`, `worse`, `equivalent` or `cannot say`.

    Args:
        difference: Difference of the two means.
        p_holm: p value of no difference, corrected for all tests of the family.
        p_equivalence_holm: p value of a difference of at least the margin, corrected in the same way.
        level: Significance level of the family, for each of the two kinds of statement.
    """
    if p_holm <= level:
        return "better" if difference > 0 else "worse"
    return "equivalent" if p_equivalence_holm <= level else "cannot say"


@lru_cache(maxsize=4096)
def detectable_difference(discordant: int, n: int, level: float, power: float = 0.8) -> float:
    """Computes the smallest difference of two accuracies that McNemar's exact test detects with probability `power`.

    Each of n problems is discordant with the observed probability ψ = (b + c)/n, and is then correct for the better run
    with q = (1 + δ/ψ)/2, where δ is the difference of the accuracies. The test detects it if the exact p value of b
    against m − b, 2·P(Bin(m, ½) ≥ max(b, m − b)), is at most `level`. Its power is

        Σ_m P(Bin(n, ψ) = m)·[P(Bin(m, q) ≤ k_m) + P(Bin(m, q) ≥ m − k_m)],

    where k_m is the largest k with 2·P(Bin(m, ½) ≤ k) ≤ level. It increases with δ, so the δ at which it equals `power`
    is found by root finding. This is the exact form of Connor (1987), whose normal approximation is
    δ = √ψ·(z_α·√n + z_β·√(n − z_α² + z_β²))/(n + z_β²).

    Args:
        discordant: Number of discordant problems, b + c.
        n: Number of problems.
        level: Significance level of the test; in a family of tests, Holm's first threshold.
        power: Required probability of detection.

    Returns:
        NaN if no difference is detectable: with so few discordant problems, not even if all favour the same run.
    """
    from scipy.optimize import brentq  # slow to import
    from scipy.stats import binom  # slow to import

    share = discordant / n if n else 0.0
    spread = 8 * np.sqrt(n * share * (1 - share)) + 1
    counts = np.arange(max(0, int(discordant - spread)), min(n, int(discordant + spread) + 1) + 1)
    weights = binom.pmf(counts, n, share)
    # ppf returns the smallest k with P(X ≤ k) ≥ level/2; needed is the largest k with P(X ≤ k) ≤ level/2.
    critical = binom.ppf(level / 2, counts, 0.5)
    critical -= binom.cdf(critical, counts, 0.5) > level / 2

    def power_at(difference: float) -> float:
        q = (1 + difference / share) / 2
        either = binom.cdf(critical, counts, q) + binom.sf(counts - critical - 1, counts, q)
        return float(np.sum(weights * np.where(critical < 0, 0.0, either)))

    if share == 0 or power_at(share) < power:
        return float("nan")
    return float(brentq(lambda difference: power_at(difference) - power, 0.0, share, xtol=1e-6))


def sign_flip(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Computes the two-sided p value of mean(first) = mean(second) with sign flips of paired differences (Fisher 1935).

    Used for outcomes averaged over several runs: McNemar's test would give a problem that one run in four misses the
    same weight as one that all miss, and find spurious differences between an average of runs and a single run.

    All sign flips are enumerated, so that p can be as small as Holm's correction of many tests requires. Shares of r
    samples are multiples of 1/r, so the flipped sum takes few values, and its distribution is an inverse Fourier
    transform of Π cos(πkw/N) over the differences w, accurate to about 10⁻¹³. Differences that are not multiples of a
    unit fraction of at least 1/120 are rounded to multiples of 1/120; the test remains exact, since rounding does not
    depend on the sign.

    Args:
        first: Share of correct samples per problem, shape (problems,).
        second: The same for the other side, averaged over any number of runs, shape (problems,).
    """
    from scipy.fft import irfft, next_fast_len  # slow to import
    from scipy.stats import binomtest  # slow to import

    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    grid = next(
        (g for g in range(1, _FINEST) if np.abs(g * difference - np.rint(g * difference)).max() < 1e-6), _FINEST
    )
    weights = np.rint(grid * difference).astype(int)
    weights = weights[weights != 0]
    if np.unique(np.abs(weights)).size < 2:  # the sign test, equal to McNemar's for single answers
        return float(binomtest(int(np.sum(weights > 0)), weights.size).pvalue) if weights.size else 1.0
    sizes, counts = np.unique(np.abs(weights), return_counts=True)
    total, observed = int(sizes @ counts), abs(int(weights.sum()))
    length = next_fast_len(total + 1, real=True)
    frequencies = np.arange(length // 2 + 1)
    spectrum = np.exp(-1j * np.pi * (frequencies * total % (2 * length)) / length)
    for size, count in zip(sizes, counts, strict=True):
        spectrum *= np.cos(np.pi * frequencies * size / length) ** count
    probabilities = irfft(spectrum, length)  # of each sum of the differences that are flipped to positive
    tail = 2 * float(np.sum(probabilities[: (total - observed) // 2 + 1]))
    return min(1.0, max(tail, float(2.0 ** (1 - weights.size))))


def bootstrap_difference(
    first: NDArray[np.float64], second: NDArray[np.float64], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Computes the 95% percentile interval of mean(first) − mean(second), resampling problems.

    Args:
        first: Outcome per problem, averaged over its samples, so that they are resampled together; shape (problems,).
        second: The same for the other run, shape (problems,).
        resamples: Number of bootstrap samples.
        seed: Seed of the generator.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    means = _draws(len(difference), resamples, seed) @ difference / len(difference)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(n: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """Returns how often each problem occurs in each bootstrap sample, shape (resamples, n); the same for all pairs."""
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * resamples).reshape(resamples, n).astype(np.float64)


def jackknife_interval(
    estimate: NDArray[np.float64], without: NDArray[np.float64], fewest: int, share: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Computes the interval estimate ± t_{m−1}·√((n − 1)/n·Σ(θ₍ᵢ₎ − θ̄)²) (Tukey 1958); NaN where it is undefined.

    Args:
        estimate: Estimates from all n units, shape (estimates,).
        without: Leave-one-out estimates, shape (n, estimates).
        fewest: m, the smaller number of units of the two sides: 20 seeds of one loss do not show how the other varies.
        share: Coverage of the interval.
    """
    from scipy.stats import t as student  # slow to import

    n = len(without)
    if fewest < 3:  # without one of two units, there is nothing left to compare
        undefined = np.full_like(estimate, np.nan)
        return undefined, undefined
    spread = np.sqrt((n - 1) / n * np.sum((without - without.mean(axis=0)) ** 2, axis=0))
    half = student.ppf((1 + share) / 2, fewest - 1) * spread
    return estimate - half, estimate + half
