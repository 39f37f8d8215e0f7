"""Effects of an update on its base weights, beside those of left-rotated copies of the same update.

A copy keeps the singular values and the right singular vectors of ΔW, so its norm, its spectrum and the inputs that it
acts on; its left singular vectors are a Haar-random frame. Most effects on W0 follow from the norm alone: what a copy
does not show is the loss's.
"""

from __future__ import annotations

import numpy as np

from losslens.measures.base_weights import Principal, principal
from losslens.measures.subspaces import principal_angles
from losslens.updates.base import Array, ThinSvd, Update
from losslens.updates.orthonormal import random_frame

# Effects, in this order: Σ(σ_i(W0 + ΔW) − σ_i(W0))² over the top k; Σθ² (radians²) between the top-k left singular
# subspaces of W0 + ΔW and W0; the number of entries that bf16 would hardly tell from those of W0.
EFFECTS = ("spectrum", "rotation", "unchanged")

# Largest relative change of an entry that counts as unchanged (2511.08567).
_UNCHANGED = 1e-3


def effects(change: ThinSvd, weight: Array, base: Principal) -> Array:
    """Computes the `EFFECTS` of adding `change` to W0, shape (3,)."""
    after = weight + (change.left * change.values) @ change.right.T
    found = principal(after, base.left.shape[1])
    same = np.abs(after - weight) <= _UNCHANGED * np.maximum(np.abs(after), np.abs(weight))
    angles = principal_angles(base.left, found.left)
    return np.array([np.sum((found.values - base.values) ** 2), np.sum(angles**2), np.sum(same)])


def against_copies(update: Update, weight: Array, base: Principal, copies: int, rng: np.random.Generator) -> Array:
    """Computes the effects of an update and of left-rotated copies of it.

    Args:
        update: ΔW.
        weight: W0, shape (out, in).
        base: Its leading directions.
        copies: Number of copies, at least 2.
        rng: Source of their rotations.

    Returns:
        Shape (3, 4): for each of the `EFFECTS` that of the update, mean and variance of those of the copies, and their
        number; all 0 for a zero update.
    """
    svd = update.svd()
    if not svd.values.size:
        return np.zeros((len(EFFECTS), 4))
    of_copies = [effects(rotated(svd, rng), weight, base) for _ in range(copies)]
    mean, variance = np.mean(of_copies, axis=0), np.var(of_copies, axis=0, ddof=1)
    return np.stack([effects(svd, weight, base), mean, variance, np.full(len(EFFECTS), copies)], axis=-1)


def rotated(svd: ThinSvd, rng: np.random.Generator) -> ThinSvd:
    """Replaces the left singular vectors by a Haar-random frame."""
    return ThinSvd(random_frame(svd.left.shape, rng), svd.values, svd.right)
