"""Inner products of gradients before step 1: of two losses, and of one with the update that it led to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array, Update, Updates, pair_products


@dataclass(frozen=True)
class Gradient:
    """Gradient of a run's loss before step 1, as the update that a step of gradient descent makes.

    Attributes:
        whole: The step on all rows.
        half: The part of it that comes from half of the problems, with the divisor of all.
    """

    whole: Updates
    half: Updates


@dataclass(frozen=True)
class PairGradients:
    """Gradients of two runs; M modules.

    Attributes:
        products: Inner products of whole and half of the first with those of the second, in this order, (M, 4, 4).
        overlap: ‖G_a·G_bᵀ‖_F² of the wholes, shape (M,).
    """

    products: Array
    overlap: Array


@dataclass(frozen=True)
class GradientProducts:
    """Products of K gradients with each other; M modules.

    Attributes:
        inner: Inner products of whole and half of the first, of the second, …, shape (M, 2K, 2K).
        overlap: ‖G_i·G_jᵀ‖_F² of the wholes, shape (M, K, K).
    """

    inner: Array
    overlap: Array

    def of(self, i: int, j: int) -> PairGradients:
        """Returns those of gradients `i` and `j`, which may be one."""
        rows = [2 * i, 2 * i + 1, 2 * j, 2 * j + 1]
        return PairGradients(self.inner[:, rows][:, :, rows], self.overlap[:, i, j])


def gradient_products(gradients: Sequence[Gradient], modules: Iterable[str]) -> GradientProducts:
    """Computes the products of every two gradients, module by module."""
    inner, overlap = [], []
    for module in modules:
        parts = [update[module] for gradient in gradients for update in (gradient.whole, gradient.half)]
        products, overlaps = _matrices(parts)
        inner.append(products)
        overlap.append(overlaps[::2, ::2])
    return GradientProducts(np.array(inner), np.array(overlap))


def products_with_end(gradient: Gradient, end: Updates, modules: Iterable[str]) -> Array:
    """Computes the inner products of a gradient's whole, half and sign step and the run's update, shape (M, 4, 4)."""
    found = []
    for module in modules:
        whole = gradient.whole[module]
        products, _ = _matrices([whole, gradient.half[module], whole.sign_step(), end[module]])
        found.append(products)
    return np.array(found)


def _matrices(updates: Sequence[Update]) -> tuple[Array, Array]:
    """Returns `inner` and `right_overlap` of every two updates and of each with itself, symmetric."""
    count = len(updates)
    upper = np.triu_indices(count, 1)
    matrices = []
    own = np.array([pair_products([update, update], 1) for update in updates])[:, :, 0]
    for values, diagonal in zip(pair_products(updates, count), own.T, strict=True):
        matrix = np.diag(diagonal)
        matrix[upper] = values
        matrices.append(np.triu(matrix) + np.triu(matrix, 1).T)
    return matrices[0], matrices[1]
