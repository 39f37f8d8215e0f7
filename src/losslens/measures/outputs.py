"""Next-token distributions on fixed sequences: KL to the base, output shift and Jensen–Shannon divergence.

Distributions are those of the tokens that `measures.kept_tokens` keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from losslens.updates.base import Array

# Positions whose terms are in memory at once: they fit into the cache.
_AT_ONCE = 64


def kl(first: Array, second: Array) -> Array:
    """Computes KL(first ‖ second) in nats at each position, shape (T,), from log-probabilities of shape (T, K).

    Each term is p·log(p/q) − p + q, which is never negative, so that rounding cannot make a KL negative.
    """
    values = np.empty(len(first))
    for part in _parts(len(first)):
        values[part] = _kl(first[part], second[part])
    return values


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE))


def _kl(first: Array, second: Array) -> Array:
    a, b = first.astype(np.float64), second.astype(np.float64)
    p, q = np.exp(a), np.exp(b)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = a - b
        near = p * (difference + np.expm1(-difference))
        # Where the two are far apart nothing cancels, and the exponential may overflow; p·log p is 0 at p = 0.
        far = np.where(p > 0, p * difference, 0.0) - p + q
    values: Array = np.sum(np.where(np.abs(difference) < 1, near, far), axis=-1)
    return np.maximum(values, 0.0)


def factor_at_kl(
    kl_at: Callable[[float], float], start: float, target: float, tolerance: float, most_steps: int
) -> tuple[float, float]:
    """Finds the factor of an update at which it has a given KL, and the KL there.

    KL grows with the square of a small update, so each step multiplies the factor by √(target/KL).

    Args:
        kl_at: Measures the KL of the update times a factor.
        start: The KL at a factor of 1, above 0.
        target: The KL to reach, above 0.
        tolerance: The share by which the KL may differ from `target`.
        most_steps: The most measurements; where they do not suffice, the last factor is returned.
    """
    factor, there = 1.0, start
    for _ in range(most_steps):
        factor *= float(np.sqrt(target / there))
        there = kl_at(factor)
        if abs(there / target - 1) < tolerance or there == 0:
            break
    return factor, there


def jensen_shannon(first: Array, second: Array) -> float:
    """Computes the Jensen–Shannon divergence in nats, mean over positions, from log-probabilities of shape (T, K).

    Source: Lin 1991; symmetric, 0 for equal distributions and at most ln 2.
    """
    terms = np.empty(first.shape)
    for part in _parts(len(first)):
        a, b = first[part].astype(np.float64), second[part].astype(np.float64)
        p, q = np.exp(a), np.exp(b)
        with np.errstate(invalid="ignore"):
            middle = np.maximum(a, b) + np.log1p(np.expm1(-np.abs(a - b)) / 2)
            own = [np.where(x > 0, x * (log - middle), 0.0) for x, log in ((p, a), (q, b))]
        # In each token the sum is not negative, since the middle is the mean of the two.
        terms[part] = np.maximum(own[0] + own[1], 0.0)
    return float(np.sum(terms) / (2 * len(terms))) if len(terms) else float("nan")


def output_shifts(base: Array, models: Sequence[Array]) -> Array:
    """Computes output shifts as vectors whose inner products are mean_t Cov_π₀(F_a, F_b), shape (models, T·K).

    F = log π − log π₀ is centred under the base's distribution π₀ at each position, then weighted by √(π₀/T).

    Args:
        base: Log-probabilities of the base, shape (T, K).
        models: Those of each model, same shape.
    """
    logs = base.astype(np.float64)
    probabilities = np.exp(logs)
    weights = np.sqrt(probabilities / max(len(logs), 1))
    vectors = np.empty((len(models), logs.size))
    for vector, model in zip(vectors, models, strict=True):
        # Tokens that the base excludes have no weight, however far they are shifted.
        shift = np.subtract(model, logs, out=np.zeros_like(logs), where=probabilities > 0)
        shift -= np.sum(probabilities * shift, axis=-1, keepdims=True) / probabilities.sum(axis=-1, keepdims=True)
        vector[:] = (weights * shift).reshape(-1)
    return vectors


def cosines(first: NDArray[np.floating], second: NDArray[np.floating]) -> Array:
    """Computes the cosine of each row of `first` with each of `second`, shape (m, n); NaN for zero rows."""
    norms = np.outer(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1))
    found: Array = np.divide(
        first @ second.T, norms, dtype=np.float64, out=np.full(norms.shape, np.nan), where=norms > 0
    )
    return found
