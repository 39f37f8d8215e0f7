"""Linear mode connectivity: the loss along the straight line between two updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array


@dataclass(frozen=True)
class SequenceLosses:
    """One model's loss on fixed completions.

    Attributes:
        nll: −log π(completion | prompt) of each sequence in nats, summed over its tokens, shape (sequences,).
        tokens: Number of completion tokens of each, shape (sequences,).
    """

    nll: Array
    tokens: Array


@dataclass(frozen=True)
class Curve:
    """The loss on the way from one update to another, with 95% bootstrap intervals over the sequences.

    Attributes:
        alphas: Positions, from 0 (the first) to 1 (the second), shape (points,).
        loss: Nats a token at each, shape (points,).
        low: Lower ends of its intervals.
        high: Upper ends.
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
    """The highest rise of a curve above its endpoints, in both definitions in use.

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


def curve(alphas: Array, losses: list[SequenceLosses], resamples: int = 1000, seed: int = 0) -> Curve:
    """Sums up the losses at the points of a line.

    The loss is Σ nll / Σ tokens. Each bootstrap sample draws whole sequences, the same ones at every point, so that
    what is hard about a sequence cancels between the points.

    Args:
        alphas: Where they were measured, from 0 to 1, shape (points,).
        losses: One for each point, on the same sequences.
        resamples: Bootstrap samples.
        seed: Of the generator.
    """
    nll = np.stack([point.nll for point in losses])
    tokens = losses[0].tokens.astype(np.float64)
    count = len(tokens)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)
    drawn = (weights @ nll.T) / (weights @ tokens)[:, None]
    loss = nll.sum(axis=1) / tokens.sum()
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    values, samples = barriers(alphas, loss), barriers(alphas, drawn)
    chord, mean = (_with_interval(value, sample) for value, sample in zip(values, samples, strict=True))
    return Curve(alphas, loss, low, high, chord, mean)


def _with_interval(value: Array, samples: Array) -> tuple[float, float, float]:
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(value), float(low), float(high)
