"""Dense updates ΔW, of which nothing but the matrix is known: differences of two checkpoints, and DoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from scipy.sparse.linalg import eigsh

from losslens.updates.base import Array, ThinSvd, Update
from losslens.updates.orthonormal import random_frame

# Up to this smaller dimension LAPACK's SVD of the matrix itself is quick enough.
_EXACT = 512
# Singular values below this share of the largest are rounding where they are roots of eigenvalues of a Gram matrix.
_GRAM_NULL = 1e-7


@dataclass(frozen=True)
class DenseUpdate(Update):
    """Update of any kind, as a matrix.

    The SVD of a matrix with more than 512 rows and columns goes through the Gram matrix of its shorter side. Singular
    values beyond the leading ones then have an absolute error of about 1e-8 of the largest, and those below 1e-7 of it
    are left out.

    Attributes:
        matrix: ΔW, shape (out, in), float64.
    """

    matrix: Array

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.matrix.shape
        return out, into

    def dense(self) -> Array:
        return self.matrix

    def arrays(self) -> dict[str, Array]:
        return {"matrix": self.matrix}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        return type(self)(np.asarray(arrays["matrix"], dtype=np.float64))

    def __rmul__(self, factor: float) -> Self:
        return type(self)(factor * self.matrix)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.matrix + other.matrix)

    def svd(self, top: int | None = None) -> ThinSvd:
        """Computes the SVD; that of a large matrix by Lanczos (ARPACK) on its Gram matrix, if few vectors are asked.

        The leading singular values and vectors are those of ΔW·V_k, with V_k from the Gram matrix, so they do not
        lose half of the digits to the squaring (Rayleigh–Ritz).
        """
        size = min(self.shape)
        if size <= _EXACT or top is None or top > size // 4:
            return super().svd(top)
        squares = np.linalg.eigvalsh(self._gram)[::-1]
        if not squares[0] > 0:
            return ThinSvd(np.zeros((self.shape[0], 0)), np.zeros(0), np.zeros((self.shape[1], 0)))
        values = np.sqrt(squares[squares > _GRAM_NULL**2 * squares[0]])
        # A fixed start, so that the same update has the same numbers each time.
        start = np.random.default_rng(0).standard_normal(size)
        _, near = eigsh(self._gram, k=min(top, len(values)), v0=start)
        tall = self._tall
        left, leading, turn = np.linalg.svd(tall @ near, full_matrices=False)
        right = near @ turn.T
        values[: len(leading)] = leading
        return ThinSvd(left, values, right) if tall is self.matrix else ThinSvd(right, values, left)

    def inner(self, other: Update) -> float:
        """Computes ⟨ΔW, ΔW'⟩; from the factors of the other, if it has them."""
        if other.rank < self.rank:
            return other.inner(self)
        return float(np.vdot(self.matrix, other.dense()))

    def right_overlap(self, other: Update) -> float:
        """Computes ‖ΔW·ΔW'ᵀ‖_F² = ⟨ΔWᵀΔW, ΔW'ᵀΔW'⟩, in whichever form needs the smaller matrices."""
        if isinstance(other, DenseUpdate) and self._tall is self.matrix:
            return float(np.vdot(self._gram, other._gram))
        return super().right_overlap(other)

    def left_rotated(self, rng: np.random.Generator) -> Self | None:
        """Draws F·diag(σ)·Vᵀ with F a uniformly random frame; None for a large matrix, whose full SVD takes minutes."""
        if min(self.shape) > _EXACT:
            return None
        svd = self.svd()
        return type(self)((random_frame(svd.left.shape, rng) * svd.values) @ svd.right.T)

    @property
    def _tall(self) -> Array:
        """ΔW or its transpose, with at least as many rows as columns."""
        out, into = self.shape
        return self.matrix if out >= into else self.matrix.T

    @cached_property
    def _gram(self) -> Array:
        """Gram matrix of the shorter side."""
        tall = self._tall
        return np.asarray(tall.T @ tall, dtype=np.float64)
