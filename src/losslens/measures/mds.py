"""Map of updates: points in a plane whose distances approximate the angles between updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array


@dataclass(frozen=True)
class MdsPlane:
    """N points in a plane.

    Attributes:
        points: Coordinates, shape (N, 2), centred, the longer axis first.
        kept: The share of the variance shown in the plane, (λ₁ + λ₂)/Σ|λ| (Mardia, Kent and Bibby 1979, 14.4.7); NaN if
            all points coincide.
    """

    points: Array
    kept: float


def mds(distances: Array) -> MdsPlane:
    """Computes classical multidimensional scaling (Torgerson 1952) into two dimensions.

    B = −½·J(D∘D)J with J = I − 11ᵀ/N holds the inner products of centred points with the distances D; with
    eigenvalues λ₁ ≥ λ₂ ≥ … and eigenvectors v the coordinates are √λ₁·v₁ and √λ₂·v₂. Angles are distances on a sphere,
    not in a flat space, so some λ may be negative; they count as variance that is not shown.

    Args:
        distances: Shape (N, N), symmetric, 0 on the diagonal.

    Returns:
        The plane. Each axis is oriented so that its farthest point is positive, so the same distances give the same
        points.
    """
    n = len(distances)
    centring = np.eye(n) - np.full((n, n), 1 / n)
    values, vectors = np.linalg.eigh(-0.5 * centring @ (np.asarray(distances, dtype=np.float64) ** 2) @ centring)
    values, vectors = values[::-1], vectors[:, ::-1]
    total = float(np.abs(values).sum())
    # Eigenvalues below this are rounding (points on a line, or a single point).
    lengths = np.where(values > 1e-12 * total, values, 0.0)[:2]
    points = np.zeros((n, 2))
    points[:, : len(lengths)] = vectors[:, :2] * np.sqrt(lengths)
    farthest = points[np.abs(np.round(points, 9)).argmax(axis=0), [0, 1]]
    return MdsPlane(points * np.where(farthest < 0, -1.0, 1.0), float(lengths.sum()) / total if total else float("nan"))


def angles(cosines: Array) -> Array:
    """Converts cosines to degrees; cosines just beyond ±1 by rounding are clipped."""
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
