"""The way of one run through the weights: how far it is, where it heads, and where on it a norm is reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from losslens.geometry.comparison import Updates
from losslens.geometry.deltas import Delta
from losslens.geometry.subspaces import Array


@dataclass(frozen=True)
class Path:
    """Inner products along a run's way, over all modules. S points in order of their steps.

    Attributes:
        norms: ‖ΔW‖_F of each point, shape (S,).
        to_next: ⟨ΔW_s, ΔW_{s+1}⟩, shape (S − 1,).
        to_targets: ⟨ΔW_s, target⟩, shape (S, targets).
        target_norms: ‖target‖_F, shape (targets,).
    """

    norms: Array
    to_next: Array
    to_targets: Array
    target_norms: Array

    @property
    def cosines(self) -> Array:
        """Cosine of each point to each target, shape (S, targets); NaN where one of them is 0."""
        norms = self.norms[:, None] * self.target_norms[None, :]
        return np.divide(self.to_targets, norms, out=np.full(norms.shape, np.nan), where=norms > 0)


def path(points: Sequence[Updates], targets: Sequence[Updates], modules: Sequence[str]) -> Path:
    """Measures `points`, in order of their steps, against each other and against `targets`, in factor space."""
    squared, to_next = np.zeros(len(points)), np.zeros(max(0, len(points) - 1))
    to_targets, squared_targets = np.zeros((len(points), len(targets))), np.zeros(len(targets))
    for module in modules:
        there = [target[module] for target in targets]
        squared_targets += [inner(delta, delta) for delta in there]
        before: Delta | None = None
        for s, point in enumerate(points):
            delta = point[module]
            squared[s] += inner(delta, delta)
            to_targets[s] += [inner(delta, target) for target in there]
            if before is not None:
                to_next[s - 1] += inner(before, delta)
            before = delta
    return Path(np.sqrt(squared), to_next, to_targets, np.sqrt(squared_targets))


def inner(first: Delta, second: Delta) -> float:
    """⟨ΔW, ΔW'⟩ = s·s'·Σ[(BᵀB') ∘ (AA'ᵀ)] of two updates of one module."""
    return first.scale * second.scale * float(np.vdot(first.b.T @ second.b, first.a @ second.a.T))


@dataclass(frozen=True)
class Crossing:
    """Where a path first reaches a norm: (1 − weight)·ΔW_before + weight·ΔW_after.

    Attributes:
        before: Number of the point before it; −1 is the start, ΔW = 0.
        weight: In (0, 1].
    """

    before: int
    weight: float


def first_crossing(norms: Sequence[float] | Array, to_next: Sequence[float] | Array, norm: float) -> Crossing | None:
    """The first place at which the path, straight from point to point and beginning at ΔW = 0, has the norm `norm`.

    On a segment ‖(1−t)ΔW_a + tΔW_b‖² = (1−t)²‖ΔW_a‖² + 2t(1−t)⟨ΔW_a, ΔW_b⟩ + t²‖ΔW_b‖², a quadratic in t, so the
    norm at the place found is exact.

    Args:
        norms: ‖ΔW‖ of the points, shape (S,).
        to_next: ⟨ΔW_s, ΔW_{s+1}⟩, shape (S − 1,).
        norm: The norm to reach.

    Returns:
        None when no point of the path has that norm.
    """
    for s, after in enumerate(norms):
        before, product = (norms[s - 1], to_next[s - 1]) if s else (0.0, 0.0)
        # a·t² + 2·b·t + c = 0; before it c < 0, since no earlier place had the norm.
        a, b, c = before**2 - 2 * product + after**2, product - before**2, before**2 - norm**2
        if after >= norm and a > 0:
            return Crossing(s - 1, min(1.0, (-b + math.sqrt(b * b - a * c)) / a))
    return None


def between(before: Delta | None, after: Delta, weight: float) -> Delta:
    """(1 − weight)·ΔW_before + weight·ΔW_after as one update of the ranks' sum; `before` None is ΔW = 0.

    The scale is 1, so that a folder of it needs alpha = rank.
    """
    b, a = weight * after.scale * after.b, after.a
    if before is None:
        return Delta(b, a, 1.0)
    return Delta(
        np.concatenate([(1 - weight) * before.scale * before.b, b], axis=1), np.concatenate([before.a, a], axis=0), 1.0
    )
