"""Interface of an update: the change ΔW of one module's weight by training, with the operations that measures need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Singular values below this share of the largest are rounding; their directions are left out.
NULL = 1e-10


@dataclass(frozen=True)
class ThinSvd:
    """Thin SVD ΔW = `left`·diag(`values`)·`right`ᵀ without null directions.

    Attributes:
        left: Left (output) singular vectors in columns, shape (out, k), k at most the rank.
        values: All singular values, descending, shape (rank,); empty for a zero update.
        right: Right (input) singular vectors in columns, shape (in, k).
    """

    left: Array
    values: Array
    right: Array


class Update(ABC):
    """ΔW of one module, in float64.

    Every method has a default based on `dense`; subclasses override those they can compute without that matrix.
    """

    @abstractmethod
    def dense(self) -> Array:
        """Returns ΔW, shape (out, in)."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """Returns the arrays that define the update, by the names used in checkpoints."""

    @abstractmethod
    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """Returns the same kind of update with other arrays, named as by `arrays`."""

    @abstractmethod
    def __rmul__(self, factor: float) -> Self:
        """Returns `factor`·ΔW."""

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """Returns ΔW + ΔW' of two updates of the same kind."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of ΔW."""
        out, into = self.dense().shape
        return out, into

    @property
    def rank(self) -> int:
        """The largest possible rank of an update of this kind and size."""
        return min(self.shape)

    def svd(self, top: int | None = None) -> ThinSvd:
        """Computes the SVD, with the `top` leading singular vectors (all by default)."""
        return leading(*np.linalg.svd(self.dense(), full_matrices=False), top)

    def orthonormal_factors(self) -> tuple[Array, Array]:
        """Returns Q, shape (out, k), with orthonormal columns and R, shape (k, in), with ΔW = Q·R."""
        svd = self.svd()
        return svd.left, svd.values[:, np.newaxis] * svd.right.T

    def on_inputs(self, inputs: Array) -> Array:
        """Computes ΔW·X for X of shape (in, k)."""
        return self.dense() @ inputs

    def on_outputs(self, outputs: Array) -> Array:
        """Computes ΔWᵀ·Y for Y of shape (out, k)."""
        return self.dense().T @ outputs

    def inner(self, other: Update) -> float:
        """Computes ⟨ΔW, ΔW'⟩."""
        return float(np.vdot(self.dense(), other.dense()))

    def right_overlap(self, other: Update) -> float:
        """Computes ‖ΔW·ΔW'ᵀ‖_F²: how far the two act on the same inputs, whatever their outputs."""
        if other.rank < self.rank:  # its method may be cheaper
            return other.right_overlap(self)
        return float(np.sum((self.dense() @ other.dense().T) ** 2))

    def input_space(self) -> Array | None:
        """Returns the input space to which this kind of update is confined; None if it is not confined.

        Orthonormal columns of shape (in, k). The angles between the current and the initial space are the drift.
        """
        return None

    def sign_step(self) -> Self:
        """Returns the step of sign descent where this is the step of gradient descent: Adam's first, but for its ε."""
        return self.with_arrays({name: np.sign(array) for name, array in self.arrays().items()})

    def left_rotated(self, rng: np.random.Generator) -> Self | None:
        """Draws a copy with the same singular values and inputs but random outputs; None if this kind has none."""
        return None

    @classmethod
    def of_pairs(cls, updates: Sequence[Self], fresh: int) -> list[tuple[float, float]]:
        """Computes `inner` and `right_overlap` of each pair of `pairs_of(len(updates), fresh)`."""
        pairs = [(updates[i], updates[j]) for i, j in pairs_of(len(updates), fresh)]
        return [(first.inner(second), first.right_overlap(second)) for first, second in pairs]

    @classmethod
    def matrices(cls, updates: Sequence[Self], weights: Sequence[float]) -> list[Array]:
        """Returns matrices whose successive application to x gives Σ w_i·ΔW_i·x, for a forward pass; w_i ≥ 0."""
        return [np.sum([w * update.dense() for w, update in zip(weights, updates, strict=True)], axis=0)]


class Updates(Protocol):
    """The updates of one run by module: an open adapter folder or any mapping."""

    def __getitem__(self, module: str, /) -> Update: ...


def leading(u: Array, values: Array, vt: Array, top: int | None) -> ThinSvd:
    """Builds a `ThinSvd` from a full SVD, dropping null directions."""
    kept = int(np.sum(values > NULL * values[0])) if values.size and values[0] > 0 else 0
    k = kept if top is None else min(top, kept)
    return ThinSvd(u[:, :k], values[:kept], vt[:k].T)


def pairs_of(count: int, fresh: int) -> list[tuple[int, int]]:
    """Returns the pairs (i, j), i < j, of `count` runs with i among the first `fresh`."""
    return [(i, j) for i in range(fresh) for j in range(i + 1, count)]


def pair_products(updates: Sequence[Update], fresh: int) -> tuple[Array, Array]:
    """Computes `inner` and `right_overlap` of all `pairs_of`, each of shape (pairs,); updates of one kind together."""
    products: dict[tuple[int, int], tuple[float, float]] = {}
    for kind in {type(update) for update in updates}:
        members = [n for n, update in enumerate(updates) if type(update) is kind]
        first = sum(n < fresh for n in members)
        pairs = [(members[i], members[j]) for i, j in pairs_of(len(members), first)]
        products |= zip(pairs, kind.of_pairs([updates[n] for n in members], first), strict=True)
    all_pairs = pairs_of(len(updates), fresh)
    for i, j in all_pairs:
        if (i, j) not in products:
            [products[i, j]] = Update.of_pairs([updates[i], updates[j]], 1)
    inner, overlap = np.array([products[pair] for pair in all_pairs], dtype=np.float64).reshape(-1, 2).T
    return inner, overlap


def forward_matrices(updates: Sequence[Update], weights: Sequence[float]) -> list[Array]:
    """Returns `Update.matrices` of the updates' common kind, or the dense default if they are of several kinds."""
    kinds = {type(update) for update in updates}
    return (kinds.pop() if len(kinds) == 1 else Update).matrices(updates, weights)
