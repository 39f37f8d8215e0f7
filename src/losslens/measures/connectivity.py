"""Linear mode connectivity: the loss along the straight path between two updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array


@dataclass(frozen=True)
class SequenceNll:
    """One model's loss on fixed completions.

    Attributes:
        nll: −log π(completion | prompt) of each sequence in nats, summed over its tokens, shape (sequences,).
        tokens: Number of completion tokens of each sequence, shape (sequences,).
    """

    nll: Array
    tokens: Array


@dataclass(frozen=True)
class Curve:
    """The loss on the straight path between two updates, with 95% bootstrap intervals over sequences.

    Attributes:
        alphas: Positions on the path, from 0 (first update) to 1 (second update), shape (points,).
        loss: Loss at each position in nats per token, shape (points,).
        low: Lower ends of the intervals, shape (points,).
        high: Upper ends of the intervals, shape (points,).
        chord: `barriers` against the chord: value, low, high.
        mean: `barriers` against the mean of the endpoints: value, low, high.
    """

    alphas: Array
    loss: Array
    low: Array
    high: Array
    chord: tuple[float, float, float]
    mean: tuple[float, float, float]


def barriers(alphas: Array, losses: Array) -> tuple[Array, Array]:
    """Computes the barrier of a curve in both common definitions.

    Args:
        alphas: Shape (points,), from 0 to 1.
        losses: Shape (…, points).

    Returns:
        max_α [L(α) − ((1 − α)·L(0) + α·L(1))], against the chord (Entezari et al. 2022), never below 0;
        max_α L(α) − (L(0) + L(1))/2, against the mean of the endpoints (Frankle et al. 2020, arXiv 1912.05671), never
        below half the endpoints' difference. Both of shape (…).
    """
    first, last = losses[..., :1], losses[..., -1:]
    chord = (losses - ((1 - alphas) * first + alphas * last)).max(axis=-1)
    mean = losses.max(axis=-1) - (first + last)[..., 0] / 2
    return chord, mean


def curve(alphas: Array, losses: list[SequenceNll], resamples: int = 1000, seed: int = 0) -> Curve:
    """Computes the loss curve and its barriers from the losses at the points of a path.

    The loss is Σ nll / Σ tokens. Each bootstrap sample draws whole sequences, the same ones at every point, so that the
    difficulty of a sequence cancels between points.

    Args:
        alphas: Positions of the points, from 0 to 1, shape (points,).
        losses: The losses at each point, on the same sequences.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.
    """
    nll = np.stack([point.nll for point in losses])
    tokens = losses[0].tokens.astype(np.float64)
    weights = _resampled(len(tokens), resamples, seed)
    drawn = (weights @ nll.T) / (weights @ tokens)[:, None]
    loss = nll.sum(axis=1) / tokens.sum()
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    values, samples = barriers(alphas, loss), barriers(alphas, drawn)
    chord, mean = (_with_interval(value, sample) for value, sample in zip(values, samples, strict=True))
    return Curve(alphas, loss, low, high, chord, mean)


def _with_interval(value: Array, samples: Array) -> tuple[float, float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(value), float(low), float(high)


def loss_difference(
    first: SequenceNll, second: SequenceNll, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Computes the first loss minus the second, in nats per token, with its 95% bootstrap interval over sequences.

    Args:
        first: The loss on each sequence.
        second: Another loss on the same sequences.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.
    """
    tokens, gap = first.tokens.astype(np.float64), first.nll - second.nll
    drawn = _resampled(len(tokens), resamples, seed)
    value = gap.sum() / tokens.sum()
    return _with_interval(value, (drawn @ gap) / (drawn @ tokens))


def _resampled(count: int, resamples: int, seed: int) -> Array:
    """Returns how often each sequence occurs in each bootstrap sample, shape (resamples, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
