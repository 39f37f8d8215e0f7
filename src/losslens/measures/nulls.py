"""Nulls by random singular vectors: the angles of random subspaces, and shares in a given subspace.

The null hypothesis keeps the singular values and draws the singular vectors independently and uniformly (Haar). It
holds exactly for two updates B·A with independent Gaussian factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from losslens.updates.base import Array


def expected_angles(subspaces: Sequence[tuple[int, int, int]], draws: int = 200, seed: int = 0) -> tuple[float, float]:
    """Computes the expected median over modules of the smallest and largest angle of random subspaces, in degrees.

    Args:
        subspaces: For each module (d, k, l): the dimensions of the space and of the two subspaces.
        draws: Number of draws of all modules, over which the medians are averaged.
        seed: Seed of the draws.
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
        return float("nan"), float("nan")
    low, high = (np.median(np.concatenate(part, axis=1), axis=1).mean() for part in (smallest, largest))
    return float(np.degrees(low)), float(np.degrees(high))


def random_angles(d: int, k: int, l: int, draws: int, rng: np.random.Generator) -> Array:
    """Draws principal angles (radians, ascending) of pairs of random subspaces of ℝᵈ, shape (draws, min(k, l)).

    The squared cosines of a k- and an l-dimensional subspace are the eigenvalues of (GᵀG + W)⁻¹GᵀG with G a k×l
    Gaussian matrix and W Wishart with d − k degrees of freedom (Absil, Edelman and Koev 2006), so no
    vector of length d is drawn.
    """
    k, l = max(k, l), min(k, l)
    gaussian = rng.standard_normal((draws, k, l))
    inside = gaussian.transpose(0, 2, 1) @ gaussian
    if d - k >= l:
        outside = _wishart(d - k, l, draws, rng)
    else:
        rest = rng.standard_normal((draws, d - k, l))
        outside = rest.transpose(0, 2, 1) @ rest
    whitening = np.linalg.inv(np.linalg.cholesky(inside + outside))
    squared_cosines = np.linalg.eigvalsh(whitening @ inside @ whitening.transpose(0, 2, 1))
    angles: Array = np.arccos(np.sqrt(np.clip(squared_cosines[:, ::-1], 0.0, 1.0)))
    angles[:, : max(0, k + l - d)] = 0  # two such subspaces always share this many directions
    return angles


def _wishart(df: int, size: int, draws: int, rng: np.random.Generator) -> Array:
    """Draws Wishart matrices T·Tᵀ by Bartlett's decomposition, shape (draws, size, size).

    The same matrices as `scipy.stats.wishart`, whose import takes longer than the comparison of two adapters.
    """
    factors = np.zeros((draws, size, size))
    factors[:, *np.tril_indices(size, -1)] = rng.normal(size=draws * (size * (size - 1) // 2)).reshape(draws, -1)
    for i in range(size):
        factors[:, i, i] = np.sqrt(rng.chisquare(df - i, size=draws))
    drawn: Array = factors @ factors.transpose(0, 2, 1)
    return drawn


def frame_variance(single: Array, dimension: Array, concentration: Array) -> Array:
    """Computes Var Σ p_i·x_i for x_i = h_iᵀMh_i, h_i the columns of a Haar-random orthonormal frame and Σ p_i = 1.

    The sum of x over a whole basis is tr M whatever the basis, so two different x_i have the covariance
    −Var x/(dimension − 1).

    Args:
        single: Var x_i.
        dimension: Dimension of the space of the frame.
        concentration: Σ p_i².
    """
    others = np.maximum(dimension - 1, 1)  # in one dimension nothing varies: single is 0
    return np.maximum(single * (concentration - (1 - concentration) / others), 0.0)


def beta_bound(mean: Array, variance: Array, largest: Array) -> Array:
    """Computes the value that 95% of a variable on [0, `largest`] stay below: beta law with its mean and variance.

    A normal law would give mean + 1.645 sd, below which only 92 to 96% of such shares lie, since they are skewed.
    """
    from scipy.special import betaincinv  # slow to import, and not needed to show measures

    largest = np.where(largest > 0, largest, np.nan)
    m, v = mean / largest, variance / largest**2
    varies = v > 0
    size = np.divide(m * (1 - m), v, out=np.ones(np.broadcast_shapes(m.shape, v.shape)), where=varies) - 1
    bound: Array = largest * np.where(varies, betaincinv(m * size, (1 - m) * size, 0.95), m)
    return bound
