"""Trajectory of one run in weight space: its norms, its cosines to targets, and where it first reaches a norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from losslens.measures.definitions.weight_space import beyond_chance
from losslens.updates.base import Array, Update, Updates

# K, the number of leading directions whose settling is followed.
LEADING = 4

Kind = TypeVar("Kind", bound=Update)


@dataclass(frozen=True)
class Trajectory:
    """Inner products along the trajectory of a run, over all modules; S points in order of their steps.

    Attributes:
        norms: ‖ΔW‖_F of each point, shape (S,).
        to_next: ⟨ΔW_s, ΔW_{s+1}⟩, shape (S − 1,).
        steps: ‖ΔW_s − ΔW_{s−1}‖_F² in each module, the first from ΔW = 0, shape (M, S).
        to_targets: ⟨ΔW_s, target⟩, shape (S, targets).
        target_norms: ‖target‖_F, shape (targets,).
    """

    norms: Array
    to_next: Array
    steps: Array
    to_targets: Array
    target_norms: Array

    @property
    def cosines(self) -> Array:
        """Cosine of each point to each target, shape (S, targets); NaN where either is zero."""
        norms = self.norms[:, None] * self.target_norms[None, :]
        cosines: Array = np.divide(self.to_targets, norms, out=np.full(norms.shape, np.nan), where=norms > 0)
        return cosines


def trajectory(points: Sequence[Updates], targets: Sequence[Updates], modules: Sequence[str]) -> Trajectory:
    """Measures `points`, in order of their steps, against the next point and against `targets`."""
    squared, to_next = np.zeros(len(points)), np.zeros(max(0, len(points) - 1))
    steps = np.zeros((len(modules), len(points)))
    to_targets, squared_targets = np.zeros((len(points), len(targets))), np.zeros(len(targets))
    for m, module in enumerate(modules):
        target_updates = [target[module] for target in targets]
        squared_targets += [target.inner(target) for target in target_updates]
        before: Update | None = None
        size = 0.0
        for s, point in enumerate(points):
            update = point[module]
            size_before, size = size, update.inner(update)
            squared[s] += size
            to_targets[s] += [update.inner(target) for target in target_updates]
            product = 0.0 if before is None else before.inner(update)
            if s:
                to_next[s - 1] += product
            steps[m, s] = max(0.0, size_before - 2 * product + size)  # rounding can make a zero step negative
            before = update
    return Trajectory(np.sqrt(squared), to_next, steps, to_targets, np.sqrt(squared_targets))


def left_overlaps(points: Sequence[Updates], targets: Sequence[Updates], modules: Sequence[str]) -> Array:
    """Computes the overlap of the leading left singular subspaces of each point and target, beyond chance.

    Compares K = `LEADING` directions, or as many as the smaller of the two ranks, by `beyond_chance`.

    Returns:
        Shape (S, targets, M); NaN where an update is zero.
    """
    found = np.full((len(points), len(targets), len(modules)), np.nan)
    for m, module in enumerate(modules):
        ends = [target[module].svd(LEADING).left for target in targets]
        for s, point in enumerate(points):
            left = point[module].svd(LEADING).left
            for t, end in enumerate(ends):
                if k := min(left.shape[1], end.shape[1]):
                    squared = np.sum((left[:, :k].T @ end[:, :k]) ** 2) / k
                    found[s, t, m] = beyond_chance(squared, np.array(k), np.array(len(left)))
    return found


@dataclass(frozen=True)
class NormCrossing:
    """Point where a trajectory first reaches a norm: (1 − weight)·ΔW_before + weight·ΔW_after.

    Attributes:
        before: Index of the point before the crossing; −1 is the start, ΔW = 0.
        weight: In (0, 1].
    """

    before: int
    weight: float


def first_norm_crossing(
    norms: Sequence[float] | Array, to_next: Sequence[float] | Array, norm: float
) -> NormCrossing | None:
    """Finds the first point at which the piecewise linear path from ΔW = 0 through all points has the norm `norm`.

    On a segment ‖(1−t)ΔW_a + tΔW_b‖² = (1−t)²‖ΔW_a‖² + 2t(1−t)⟨ΔW_a, ΔW_b⟩ + t²‖ΔW_b‖², a quadratic in t, so the
    norm at the crossing is exact.

    Args:
        norms: ‖ΔW‖ of the points, shape (S,).
        to_next: ⟨ΔW_s, ΔW_{s+1}⟩, shape (S − 1,).
        norm: The norm to reach.

    Returns:
        The crossing, or None if no point of the path has that norm.
    """
    for s, after in enumerate(norms):
        before, product = (norms[s - 1], to_next[s - 1]) if s else (0.0, 0.0)
        # a·t² + 2·b·t + c = 0; c < 0, since no earlier point had the norm.
        a, b, c = before**2 - 2 * product + after**2, product - before**2, before**2 - norm**2
        if after >= norm and a > 0:
            return NormCrossing(s - 1, min(1.0, (-b + math.sqrt(b * b - a * c)) / a))
    return None


def interpolate(before: Kind | None, after: Kind, weight: float) -> Kind:
    """Computes (1 − weight)·ΔW_before + weight·ΔW_after; `before=None` is ΔW = 0."""
    return weight * after if before is None else (1 - weight) * before + weight * after
