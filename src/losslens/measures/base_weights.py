"""Measures of updates relative to the base weights W0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array, Update

# Up to this smaller dimension the full SVD is faster than Lanczos.
_DENSE = 512


@dataclass(frozen=True)
class Principal:
    """The leading singular directions of one W0.

    Attributes:
        norm: ‖W0‖_F.
        values: Top-k singular values, descending, shape (k,).
        left: Top-k left (output) singular vectors in columns, shape (out, k).
        right: Top-k right (input) singular vectors in columns, shape (in, k).
    """

    norm: float
    values: Array
    left: Array
    right: Array


def principal(weight: Array, top: int = 10) -> Principal:
    """Computes the top-k singular subspaces of W0, shape (out, in), by Lanczos (ARPACK) to machine precision."""
    from scipy.sparse.linalg import svds  # slow to import

    if min(weight.shape) <= max(_DENSE, top) or not weight.any():
        u, values, vt = np.linalg.svd(weight, full_matrices=False)
    else:
        u, values, vt = svds(weight, k=top, v0=np.ones(min(weight.shape)), solver="arpack")
        order = np.argsort(-values)
        u, values, vt = u[:, order], values[order], vt[order]
    return Principal(float(np.linalg.norm(weight)), values[:top], u[:, :top], vt[:top].T)


@dataclass(frozen=True)
class PrincipalParts:
    """Parts of an update in the top-k singular subspaces U_k, V_k of W0, and the moments that their null needs.

    Attributes:
        left: ‖U_kᵀ·ΔW‖².
        right: ‖ΔW·V_k‖².
        both: ‖U_kᵀ·ΔW·V_k‖².
        concentration: Σp² with p the shares of the squared singular values of ΔW·V_k; 1 if it has rank 1, NaN if it is
            zero.
        start_mean: Mean of ‖V_kᵀh‖² over the unit vectors h of the inputs to which the update was confined at the
            start; NaN if these are unknown.
        start_variance: Variance of the same.
        start_dimension: Dimension of the space of these inputs.
    """

    left: float
    right: float
    both: float
    concentration: float
    start_mean: float
    start_variance: float
    start_dimension: float


def principal_parts(update: Update, start: Array | None, base: Principal) -> PrincipalParts:
    """Measures an update against the leading singular directions of W0, from its products with them.

    Args:
        update: ΔW.
        start: `input_space` of the update that training started from; None if unknown or not confined.
        base: The leading directions of W0.
    """
    inputs, outputs = update.on_inputs(base.right), update.on_outputs(base.left)
    right = float(np.sum(inputs**2))
    concentration = float(np.sum((inputs.T @ inputs) ** 2)) / right**2 if right > 0 else float("nan")
    both = float(np.sum((base.left.T @ inputs) ** 2))
    return PrincipalParts(float(np.sum(outputs**2)), right, both, concentration, *_start(update, start, base.right))


def _start(update: Update, start: Array | None, right: Array) -> tuple[float, float, float]:
    """Computes mean and variance of hᵀMh, M = V_kV_kᵀ, over unit vectors h of the initial inputs; their dimension."""
    dimension, k = right.shape
    trace = squares = float(k)
    if update.input_space() is not None:
        if start is None:
            return (float("nan"),) * 3
        overlap = start.T @ right
        dimension = start.shape[1]
        trace, squares = float(np.sum(overlap**2)), float(np.sum((overlap.T @ overlap) ** 2))
    variance = 2 * (squares - trace**2 / dimension) / (dimension * (dimension + 2))
    return trace / dimension, max(variance, 0.0), float(dimension)
