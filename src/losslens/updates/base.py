"""The interface of an update: what training did to one module's weight, as the measures ask about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Directions whose singular value is below this share of the largest are rounding, not directions.
NULL = 1e-10


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


class Update(ABC):
    """ΔW of one module, float64.

    All answers follow from `dense`; a kind of update overrides what it can answer without that matrix.
    """

    @abstractmethod
    def dense(self) -> Array:
        """ΔW, shape (out, in)."""

    @abstractmethod
    def arrays(self) -> dict[str, Array]:
        """The arrays that it is made of, by the names under which a checkpoint keeps them."""

    @abstractmethod
    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        """The same made of other arrays, such as `arrays` gives."""

    @abstractmethod
    def __rmul__(self, factor: float) -> Self:
        """`factor`·ΔW."""

    @abstractmethod
    def __add__(self, other: Self) -> Self:
        """ΔW + ΔW' of two updates of one kind."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        out, into = self.dense().shape
        return out, into

    @property
    def rank(self) -> int:
        """The largest rank that an update of this kind and size can have."""
        return min(self.shape)

    def svd(self, top: int | None = None) -> ThinSvd:
        """The SVD; of the vectors the leading `top`, all by default."""
        return leading(*np.linalg.svd(self.dense(), full_matrices=False), top)

    def inner(self, other: Update) -> float:
        """⟨ΔW, ΔW'⟩."""
        return float(np.vdot(self.dense(), other.dense()))

    def right_overlap(self, other: Update) -> float:
        """‖ΔW·ΔW'ᵀ‖_F²: how far the two act on the same inputs, whatever they make of them."""
        if other.rank < self.rank:  # that one may know a cheaper way
            return other.right_overlap(self)
        return float(np.sum((self.dense() @ other.dense().T) ** 2))

    def project(self, left: Array, right: Array) -> Array:
        """`left`ᵀ·ΔW·`right` of columns of shapes (out, k) and (in, l), shape (k, l)."""
        return left.T @ self.dense() @ right

    def input_space(self) -> Array | None:
        """The inputs that the kind of update lets ΔW act on, as orthonormal columns of shape (in, k); None if all.

        The angles between this space now and at the start are the drift.
        """
        return None

    @classmethod
    def of_pairs(cls, updates: Sequence[Self], fresh: int) -> list[tuple[float, float]]:
        """`inner` and `right_overlap` of the `pairs_of` the updates."""
        pairs = [(updates[i], updates[j]) for i, j in pairs_of(len(updates), fresh)]
        return [(first.inner(second), first.right_overlap(second)) for first, second in pairs]

    @classmethod
    def matrices(cls, updates: Sequence[Self], weights: Sequence[float]) -> list[Array]:
        """Matrices that take x, one after the other, to Σ w_i·ΔW_i·x, for a forward pass; w_i ≥ 0."""
        return [np.sum([w * update.dense() for w, update in zip(weights, updates, strict=True)], axis=0)]


class Updates(Protocol):
    """The updates of one run, by module: an opened folder, or any mapping."""

    def __getitem__(self, module: str, /) -> Update: ...


def leading(u: Array, values: Array, vt: Array, top: int | None) -> ThinSvd:
    """What a `ThinSvd` has of an SVD."""
    kept = int(np.sum(values > NULL * values[0])) if values.size and values[0] > 0 else 0
    k = kept if top is None else min(top, kept)
    return ThinSvd(u[:, :k], values[:kept], vt[:k].T)


def pairs_of(count: int, fresh: int) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of `count` runs of which at least one is among the first `fresh`."""
    return [(i, j) for i in range(fresh) for j in range(i + 1, count)]


def pair_products(updates: Sequence[Update], fresh: int) -> tuple[Array, Array]:
    """`inner` and `right_overlap` of the `pairs_of` the updates, each of shape (pairs,); those of one kind together."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for kind in {type(update) for update in updates}:
        members = [n for n, update in enumerate(updates) if type(update) is kind]
        first = sum(n < fresh for n in members)
        pairs = [(members[i], members[j]) for i, j in pairs_of(len(members), first)]
        found |= zip(pairs, kind.of_pairs([updates[n] for n in members], first), strict=True)
    every = pairs_of(len(updates), fresh)
    for i, j in every:
        if (i, j) not in found:
            [found[i, j]] = Update.of_pairs([updates[i], updates[j]], 1)
    inner, overlap = np.array([found[pair] for pair in every], dtype=np.float64).reshape(-1, 2).T
    return inner, overlap


def forward_matrices(updates: Sequence[Update], weights: Sequence[float]) -> list[Array]:
    """`Update.matrices` in the way of their kind, or in the general one where they are of several."""
    kinds = {type(update) for update in updates}
    return (kinds.pop() if len(kinds) == 1 else Update).matrices(updates, weights)
