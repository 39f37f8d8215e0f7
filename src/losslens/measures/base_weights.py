"""Measures of updates relative to the base weights W0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import svds

from losslens.updates.base import Array, Update

# Up to this smaller dimension the full SVD is faster than Lanczos.
_DENSE = 512


@dataclass(frozen=True)
class Principal:
    """The leading singular directions of one W0.

    Attributes:
        norm: ‖W0‖_F.
        left: Top-k left (output) singular vectors in columns, shape (out, k).
        right: Top-k right (input) singular vectors in columns, shape (in, k).
    """

    norm: float
    left: Array
    right: Array


def principal(weight: Array, top: int = 10) -> Principal:
    """Computes the top-k singular subspaces of W0, shape (out, in), by Lanczos (ARPACK) to machine precision."""
    if min(weight.shape) <= max(_DENSE, top) or not weight.any():
        u, _, vt = np.linalg.svd(weight, full_matrices=False)
    else:
        u, values, vt = svds(weight, k=top, v0=np.ones(min(weight.shape)), solver="arpack")
        order = np.argsort(-values)
        u, vt = u[:, order], vt[order]
    return Principal(float(np.linalg.norm(weight)), u[:, :top], vt[:top].T)


def off_principal_share(update: Update, base: Principal) -> float:
    """Computes 1 − ‖U_kU_kᵀ·ΔW·V_kV_kᵀ‖²/‖ΔW‖²: the share of ‖ΔW‖² outside the top-k singular subspaces of W0.

    U_k and V_k are the leading left and right singular vectors of W0. A random update has 1 − k²/(out·in). NaN for a
    zero update.
    """
    total = float(np.sum(update.svd(0).values ** 2))
    inside = float(np.sum(update.project(base.left, base.right) ** 2))
    return 1 - inside / total if total > 0 else float("nan")
