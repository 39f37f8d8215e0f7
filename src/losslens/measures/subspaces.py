"""Principal angles between subspaces."""

from __future__ import annotations

import numpy as np

from losslens.updates.base import Array

# Below this angle (radians) the cosine loses too many digits and the sine is used.
SMALL_ANGLE = 1e-3


def principal_angles(first: Array, second: Array) -> Array:
    """Computes the principal angles between the spans of two sets of orthonormal columns, in radians, ascending.

    Source: Björck and Golub 1973; the sine for small angles as in Knyazev and Argentati 2002. SciPy's
    `subspace_angles` gives the same in descending order.

    Args:
        first: Shape (d, k).
        second: Shape (d, l).

    Returns:
        min(k, l) angles in [0, π/2].
    """
    overlap = first.T @ second
    return with_small_angles(angles_from_overlap(overlap), first, second, overlap)


def angles_from_overlap(overlap: Array) -> Array:
    """Computes angles from their cosines, the singular values of UᵀV; batched, shape (…, k, l) to (…, min(k, l)).

    Accurate to about 1e-15 / θ; see `with_small_angles`.
    """
    angles: Array = np.arccos(np.clip(np.linalg.svd(overlap, compute_uv=False), 0.0, 1.0))
    return angles


def with_small_angles(angles: Array, first: Array, second: Array, overlap: Array) -> Array:
    """Recomputes small angles from their sines, the singular values of (I − U·Uᵀ)V."""
    small = int(np.sum(angles < SMALL_ANGLE))
    if not small:
        return angles
    if first.shape[1] < second.shape[1]:
        first, second, overlap = second, first, overlap.T
    sines = np.linalg.svd(second - first @ overlap, compute_uv=False)
    return np.concatenate([np.arcsin(np.clip(sines[::-1][:small], 0.0, 1.0)), angles[small:]])
