"""What two unrelated updates of the same shapes and ranks would show: the null of every cosine and angle.

The null hypothesis: singular values as they are, singular vectors uniformly random (Haar) and independent. It holds
exactly for two updates B·A with independent Gaussian factors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln
from scipy.stats import wishart

from losslens.updates.base import Array

_TWO_SIDED_95 = 1.959963984540054


@dataclass(frozen=True)
class AngleFloor:
    """The null of angles: the expected median over modules of the smallest and the largest one, in degrees."""

    smallest: float
    largest: float


def random_cosine_bound(norms_a: Array, norms_b: Array, shapes: Sequence[tuple[int, int]]) -> float:
    """The bound that |cosine| of two unrelated updates stays below 95 times in 100.

    With independent Haar singular vectors E⟨ΔW, ΔW'⟩ = 0 and E⟨ΔW, ΔW'⟩² = ‖ΔW‖²‖ΔW'‖²/(out·in) in each module; the
    modules add up, and 1.96 standard deviations of the sum are taken (normal approximation).

    Args:
        norms_a: ‖ΔW‖_F of each module, shape (M,).
        norms_b: The same of the other run.
        shapes: (out, in) of each module.
    """
    sizes = np.array([out * into for out, into in shapes], dtype=np.float64)
    total = np.sqrt(np.sum(norms_a**2) * np.sum(norms_b**2))
    if total == 0:
        return float("nan")
    return float(_TWO_SIDED_95 * np.sqrt(np.sum((norms_a * norms_b) ** 2 / sizes)) / total)


def shared_cosine_bound(
    norms_a: Array, norms_b: Array, right_overlaps: Array, shapes: Sequence[tuple[int, int]]
) -> float:
    """The same bound for two updates that act on the same inputs: right singular vectors as they are, left ones random.

    This is the null for runs that start from one A, which training moves little: B·A and B'·A have their inputs in
    common whatever B and B' are. For a Haar-random rotation Q of the outputs E⟨ΔW, QΔW'⟩² = ‖ΔW·ΔW'ᵀ‖_F²/out.

    Args:
        norms_a: ‖ΔW‖_F of each module, shape (M,).
        norms_b: The same of the other run.
        right_overlaps: ‖ΔW·ΔW'ᵀ‖_F² of each module, shape (M,).
        shapes: (out, in) of each module.
    """
    total = np.sqrt(np.sum(norms_a**2) * np.sum(norms_b**2))
    if total == 0:
        return float("nan")
    outs = np.array([out for out, _ in shapes], dtype=np.float64)
    return float(_TWO_SIDED_95 * np.sqrt(np.sum(right_overlaps / outs)) / total)


def random_agreement(dimensions: Sequence[int]) -> float:
    """The mean over modules of E|⟨u, u'⟩| for independent unit vectors in ℝᵈ: Γ(d/2)/(√π·Γ((d + 1)/2))."""
    d = np.asarray(dimensions, dtype=np.float64)
    return float(np.mean(np.exp(gammaln(d / 2) - gammaln((d + 1) / 2)) / math.sqrt(math.pi)))


def random_angle_floor(subspaces: Sequence[tuple[int, int, int]], draws: int = 200, seed: int = 0) -> AngleFloor:
    """Principal angles of random subspaces.

    Args:
        subspaces: Of each module (d, k, l): the dimension of the space and of the two subspaces.
        draws: Draws of all modules, over which the medians are averaged.
        seed: Of the generator.
    """
    rng = np.random.default_rng(seed)
    smallest, largest = [], []
    for (d, k, l), count in sorted(Counter(subspaces).items()):
        if min(k, l) == 0:
            continue
        angles = random_angles(d, k, l, draws * count, rng).reshape(draws, count, -1)
        smallest.append(angles[..., 0])
        largest.append(angles[..., -1])
    if not smallest:
        return AngleFloor(float("nan"), float("nan"))
    medians = (np.median(np.concatenate(part, axis=1), axis=1).mean() for part in (smallest, largest))
    return AngleFloor(*(float(np.degrees(value)) for value in medians))


def random_angles(d: int, k: int, l: int, draws: int, rng: np.random.Generator) -> Array:
    """Principal angles (radians, ascending) of `draws` pairs of random subspaces of ℝᵈ, shape (draws, min(k, l)).

    The squared cosines of a k- and an l-dimensional one are the eigenvalues of (GᵀG + W)⁻¹GᵀG with G a k×l Gaussian
    matrix and W Wishart with d − k degrees of freedom (Absil, Edelman and Koev 2006): no vector of length d is drawn.
    """
    k, l = max(k, l), min(k, l)
    gaussian = rng.standard_normal((draws, k, l))
    inside = gaussian.transpose(0, 2, 1) @ gaussian
    if d - k >= l:
        outside = wishart.rvs(df=d - k, scale=np.eye(l), size=draws, random_state=rng).reshape(draws, l, l)
    else:
        rest = rng.standard_normal((draws, d - k, l))
        outside = rest.transpose(0, 2, 1) @ rest
    whitening = np.linalg.inv(np.linalg.cholesky(inside + outside))
    squared_cosines = np.linalg.eigvalsh(whitening @ inside @ whitening.transpose(0, 2, 1))
    angles = np.arccos(np.sqrt(np.clip(squared_cosines[:, ::-1], 0.0, 1.0)))
    angles[:, : max(0, k + l - d)] = 0  # so many directions they must have in common
    return angles
