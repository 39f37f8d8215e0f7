"""Where an update points: its singular vectors, and the angles between the subspaces of two updates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losslens.geometry.deltas import Delta

Array = NDArray[np.float64]

# Directions whose singular value is below this share of the largest are rounding, not directions.
_NULL = 1e-10
# Below this angle (radians) the cosine has lost too many digits and the sine is taken.
SMALL_ANGLE = 1e-3
# Up to these squared condition numbers one round of Cholesky QR is exact to 1e-10, and two to rounding.
_ONE_ROUND, _TWO_ROUNDS = 1e6, 1e12


@dataclass(frozen=True)
class ThinSvd:
    """ΔW = `left`·diag(`values`)·`right`ᵀ, null directions left out.

    Attributes:
        left: Left (output) singular vectors in columns, shape (out, k), k at most the rank.
        values: All singular values, descending, shape (rank,). Empty for an update that is 0.
        right: Right (input) singular vectors in columns, shape (in, k).
    """

    left: Array
    values: Array
    right: Array


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns Q = `frame`·`turn`, and `r` with Q·`r` = the matrix they were made of.

    Q itself is seldom needed: a few of its combinations are, and `frame @ (turn @ few)` is the cheaper product.
    """

    frame: Array
    turn: Array
    r: Array


def thin_svd(delta: Delta, top: int | None = None) -> ThinSvd:
    """The exact SVD of s·B·A without the product; of the vectors the leading `top`, all by default.

    With B = Q_b·R_b and Aᵀ = Q_a·R_a it is that of the r×r core s·R_b·R_aᵀ, turned by Q_b and Q_a.
    """
    left, right = orthonormalise(delta.b), orthonormalise(delta.a.T)
    u, values, vt = np.linalg.svd(delta.scale * left.r @ right.r.T)
    kept = int(np.sum(values > _NULL * values[0])) if values.size and values[0] > 0 else 0
    k = kept if top is None else min(top, kept)
    return ThinSvd(left.frame @ (left.turn @ u[:, :k]), values[:kept], right.frame @ (right.turn @ vt[:k].T))


def orthonormalise(matrix: Array) -> Basis:
    """An orthonormal basis of the columns of `matrix`, shape (d, r) with d ≥ r.

    Cholesky QR: R from the r×r Gram matrix, all in matrix products. Its error grows with the square of the condition
    number, so a second round is made where that is large (Yamamoto et al. 2015), and Householder's QR beyond.
    """
    gram = matrix.T @ matrix
    spectrum = np.linalg.eigvalsh(gram)
    if not spectrum[-1] < _TWO_ROUNDS * spectrum[0]:
        q, r = np.linalg.qr(matrix)
        return Basis(q, np.eye(r.shape[0]), r)
    r, turn = _cholesky(gram)
    if spectrum[-1] <= _ONE_ROUND * spectrum[0]:
        return Basis(matrix, turn, r)
    nearly = matrix @ turn
    again, turn = _cholesky(nearly.T @ nearly)
    return Basis(nearly, turn, again @ r)


def column_space(matrix: Array) -> Array:
    """Orthonormal columns that span those of `matrix`, shape (d, rank): null directions are left out."""
    basis = orthonormalise(matrix)
    u, values, _ = np.linalg.svd(basis.r)
    return basis.frame @ (basis.turn @ u[:, values > _NULL * values.max(initial=0.0)])


def _cholesky(gram: Array) -> tuple[Array, Array]:
    """R with RᵀR = `gram`, and its inverse."""
    r = np.asarray(np.linalg.cholesky(gram).T, dtype=np.float64)
    return r, np.asarray(np.linalg.inv(r), dtype=np.float64)


def principal_angles(first: Array, second: Array) -> Array:
    """The principal angles between the spans of two sets of orthonormal columns, in radians, ascending.

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
    """Angles from the cosines, the singular values of UᵀV, for a whole batch; shape (…, k, l) to (…, min(k, l)).

    Good to about 1e-15 / θ; see `with_small_angles`.
    """
    return np.arccos(np.clip(np.linalg.svd(overlap, compute_uv=False), 0.0, 1.0))


def with_small_angles(angles: Array, first: Array, second: Array, overlap: Array) -> Array:
    """`angles` with the small ones taken from their sines, the singular values of (I − U·Uᵀ)V."""
    small = int(np.sum(angles < SMALL_ANGLE))
    if not small:
        return angles
    if first.shape[1] < second.shape[1]:
        first, second, overlap = second, first, overlap.T
    sines = np.linalg.svd(second - first @ overlap, compute_uv=False)
    return np.concatenate([np.arcsin(np.clip(sines[::-1][:small], 0.0, 1.0)), angles[small:]])
