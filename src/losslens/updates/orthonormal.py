"""Orthonormal bases of the columns of thin matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.updates.base import NULL, Array

# Up to these squared condition numbers, one round of Cholesky QR is exact to 1e-10 and two are exact to rounding.
_ONE_ROUND, _TWO_ROUNDS = 1e6, 1e12


@dataclass(frozen=True)
class Basis:
    """QR decomposition in factored form: Q = `frame`·`turn`, and Q·`r` is the decomposed matrix.

    Usually only a few combinations of the columns of Q are needed; `combine` computes them without forming Q.
    """

    frame: Array
    turn: Array
    r: Array

    def combine(self, few: Array) -> Array:
        """Computes Q·`few`."""
        return self.frame @ (self.turn @ few)


def orthonormalise(matrix: Array) -> Basis:
    """Computes an orthonormal basis of the columns of `matrix`, shape (d, r) with d ≥ r.

    Uses Cholesky QR, which takes R from the r×r Gram matrix. Its error grows with the square of the condition number,
    so a second round is used where that is large (Yamamoto et al. 2015), and Householder QR beyond.
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


def random_frame(shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Draws orthonormal columns of the given shape (d, k), uniformly over all such frames (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.standard_normal(shape))
    return q * np.sign(np.diag(r))  # the signs that QR chooses would bias it


def column_space(matrix: Array) -> Array:
    """Computes orthonormal columns, shape (d, rank), that span those of `matrix`, without null directions."""
    basis = orthonormalise(matrix)
    u, values, _ = np.linalg.svd(basis.r)
    return basis.combine(u[:, values > NULL * values.max(initial=0.0)])


def _cholesky(gram: Array) -> tuple[Array, Array]:
    """Returns R with RᵀR = `gram`, and its inverse."""
    r = np.asarray(np.linalg.cholesky(gram).T, dtype=np.float64)
    return r, np.asarray(np.linalg.inv(r), dtype=np.float64)
