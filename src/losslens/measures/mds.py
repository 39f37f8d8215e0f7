"""Updates as points of a plane, whose distances are the angles between them as well as a plane can have them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array


@dataclass(frozen=True)
class MdsPlane:
    """N points.

    Attributes:
        points: Shape (N, 2), their mean at 0, the longer axis first.
        kept: The share of the variance that the plane shows, (λ₁ + λ₂)/Σ|λ| (Mardia, Kent and Bibby 1979, 14.4.7); NaN
            where all points are one.
    """

    points: Array
    kept: float


def mds(distances: Array) -> MdsPlane:
    """Classical multidimensional scaling (Torgerson 1952) into two dimensions.

    B = −½·J(D∘D)J with J = I − 11ᵀ/N holds the inner products of centred points that have the distances D; with
    eigenvalues λ₁ ≥ λ₂ ≥ … and eigenvectors v the coordinates are √λ₁·v₁ and √λ₂·v₂. Angles are distances on a sphere,
    not in a flat space, so some λ may be negative: they count as variance that is not shown.

    Args:
        distances: Shape (N, N), symmetric, 0 on the diagonal.

    Returns:
        The plane. Of the two directions that an axis may have it has the one in which its farthest point is positive,
        so the same distances give the same points.
    """
    n = len(distances)
    centring = np.eye(n) - np.full((n, n), 1 / n)
    values, vectors = np.linalg.eigh(-0.5 * centring @ (np.asarray(distances, dtype=np.float64) ** 2) @ centring)
    values, vectors = values[::-1], vectors[:, ::-1]
    total = float(np.abs(values).sum())
    # What is left of points on a line, or of one point, is rounding.
    lengths = np.where(values > 1e-12 * total, values, 0.0)[:2]
    points = np.zeros((n, 2))
    points[:, : len(lengths)] = vectors[:, :2] * np.sqrt(lengths)
    farthest = points[np.abs(np.round(points, 9)).argmax(axis=0), [0, 1]]
    return MdsPlane(points * np.where(farthest < 0, -1.0, 1.0), float(lengths.sum()) / total if total else float("nan"))


def angles(cosines: Array) -> Array:
    """The angles of cosines, in degrees; rounding may have put a cosine just beyond 1."""
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
