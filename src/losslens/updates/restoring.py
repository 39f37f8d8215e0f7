"""Updates without a subspace of their outputs: W0's components are put back there, or only there left changed."""

from __future__ import annotations

import numpy as np

from losslens.updates.base import Array, ThinSvd
from losslens.updates.lora import LoraUpdate
from losslens.updates.orthonormal import random_frame


def leading_directions(svd: ThinSvd, count: int) -> Array:
    """Returns the update's `count` leading directions among its own, shape (r, k): the columns of an identity."""
    rank = len(svd.values)
    return np.eye(rank)[:, : min(count, rank)]


def random_directions(svd: ThinSvd, count: int, rng: np.random.Generator) -> Array:
    """Draws `count` orthonormal combinations of the update's own directions, uniformly, shape (r, k)."""
    rank = len(svd.values)
    return random_frame((rank, min(count, rank)), rng)


def only(svd: ThinSvd, directions: Array) -> LoraUpdate:
    """Returns QQᵀΔW with Q = U·`directions`, for ΔW = UΣVᵀ.

    For the leading directions Q = U_k, this is U_kU_kᵀΔW = ΔWV_kV_kᵀ = U_kΣ_kV_kᵀ: the same from the left, from the
    right and from both sides.

    Args:
        svd: The whole SVD of ΔW.
        directions: Orthonormal columns, shape (r, k).
    """
    return LoraUpdate(svd.left @ directions, directions.T @ (svd.values[:, None] * svd.right.T), 1.0)


def without(svd: ThinSvd, directions: Array) -> LoraUpdate:
    """Returns ΔW − QQᵀΔW with Q = U·`directions`: W0's components along Q are restored.

    Args:
        svd: The whole SVD of ΔW.
        directions: Orthonormal columns, shape (r, k).
    """
    inner = np.diag(svd.values) - directions @ (directions.T * svd.values)
    return LoraUpdate(svd.left, inner @ svd.right.T, 1.0)


def without_outputs(svd: ThinSvd, outputs: Array) -> LoraUpdate:
    """Returns ΔW − PPᵀΔW: the update without what it writes into the space of `outputs`.

    Args:
        svd: The whole SVD of ΔW.
        outputs: P, orthonormal columns in the output space, shape (out, k).
    """
    written = svd.left * svd.values
    return LoraUpdate(written - outputs @ (outputs.T @ written), svd.right.T, 1.0)
