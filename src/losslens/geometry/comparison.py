"""Every run against every other, module by module: what `tables` sums up.

One module's factors of all runs are in memory at a time (one a worker), so memory grows with the number of runs and
not with the model. Of a pair only r×r and k×k products of the factors are ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from losslens.geometry.deltas import Delta
from losslens.geometry.subspaces import (
    SMALL_ANGLE,
    Array,
    angles_from_overlap,
    column_space,
    principal_angles,
    thin_svd,
    with_small_angles,
)

# More than four modules in memory at once would cost more than they bring.
_WORKERS = min(4, torch.get_num_threads())


class Updates(Protocol):
    """The updates of one run, by module: an `Adapter`, or any mapping."""

    def __getitem__(self, module: str, /) -> Delta: ...


@dataclass(frozen=True)
class RunGeometry:
    """One run. M modules.

    Attributes:
        singular_values: Of each module, descending, NaN past the rank, shape (M, r).
        drift: Principal angles (radians, ascending) between the row spaces of A and of the initial A, NaN past the
            rank and where there is no initial adapter, shape (M, r).
    """

    singular_values: Array
    drift: Array


@dataclass(frozen=True)
class PairGeometry:
    """Two runs. M modules, k angles. All of it is the same for (b, a) as for (a, b).

    Attributes:
        inner: ⟨ΔW_a, ΔW_b⟩, shape (M,).
        right_overlap: ‖ΔW_a·ΔW_bᵀ‖_F², shape (M,): how far the two act on the same inputs, whatever they make of them.
        angles_left: Principal angles (radians, ascending) between the top-k left singular subspaces, shape (M, k), k at
            most the largest rank; NaN where a run has fewer directions.
        angles_right: The same on the right.
        u1: |⟨u_1, u_1'⟩| of the top left singular vectors, shape (M,); NaN where a run has none.
        v1: The same on the right.
    """

    inner: Array
    right_overlap: Array
    angles_left: Array
    angles_right: Array
    u1: Array
    v1: Array


def pairs_of(count: int, fresh: int) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of `count` runs of which at least one is among the first `fresh`."""
    return [(i, j) for i in range(fresh) for j in range(i + 1, count)]


def compare(
    adapters: Sequence[Updates],
    modules: Sequence[str],
    *,
    top: int = 10,
    fresh: int | None = None,
    initial: Sequence[Updates | None] | None = None,
    progress: Callable[[Iterable[_Module]], Iterable[_Module]] = iter,
) -> tuple[list[RunGeometry], dict[tuple[int, int], PairGeometry]]:
    """Compares the adapters.

    Args:
        adapters: The runs; ranks may differ, shapes of ΔW may not.
        modules: Names of the modules.
        top: k, the number of leading singular directions whose subspaces are compared.
        fresh: Only the first so many runs are measured and compared, with each other and with the rest; by default all.
        initial: The adapter that each of the fresh runs started from, where it is known.
        progress: Wraps what is gone through module by module, for a progress bar.

    Returns:
        Of each fresh run, and of each of `pairs_of(len(adapters), fresh)`.
    """
    fresh = len(adapters) if fresh is None else fresh
    started_from = list(initial) if initial is not None else [None] * fresh
    measured = list(progress(_in_parallel(partial(_measure, adapters, top, fresh, started_from), modules)))
    runs = [
        RunGeometry(padded([m.singular_values[i] for m in measured]), padded([m.drift[i] for m in measured]))
        for i in range(fresh)
    ]
    pairs = {
        pair: PairGeometry(
            inner=np.array([m.inner[n] for m in measured]),
            right_overlap=np.array([m.right_overlap[n] for m in measured]),
            angles_left=padded([m.angles_left[n] for m in measured]),
            angles_right=padded([m.angles_right[n] for m in measured]),
            u1=np.array([m.u1[n] for m in measured]),
            v1=np.array([m.v1[n] for m in measured]),
        )
        for n, pair in enumerate(pairs_of(len(adapters), fresh))
    }
    return runs, pairs


@dataclass(frozen=True)
class _Module:
    """One module: a list or row for each fresh run, and a row for each pair."""

    singular_values: list[Array]
    drift: list[Array]
    inner: Array
    right_overlap: Array
    angles_left: Array
    angles_right: Array
    u1: Array
    v1: Array


def _measure(
    adapters: Sequence[Updates], top: int, fresh: int, initial: Sequence[Updates | None], module: str
) -> _Module:
    deltas = [adapter[module] for adapter in adapters]
    top = min(top, max(delta.a.shape[0] for delta in deltas))
    svds = [thin_svd(delta, top) for delta in deltas]
    inner, right_overlap = inner_products(deltas, fresh)
    angles_left, u1 = _side([svd.left for svd in svds], top, fresh)
    angles_right, v1 = _side([svd.right for svd in svds], top, fresh)
    starts = {id(start): column_space(start[module].a.T) for start in initial if start is not None}
    drift = [
        np.zeros(0) if start is None else principal_angles(starts[id(start)], column_space(delta.a.T))
        for start, delta in zip(initial, deltas, strict=False)
    ]
    values = [svd.values for svd in svds[:fresh]]
    return _Module(values, drift, inner, right_overlap, angles_left, angles_right, u1, v1)


def inner_products(deltas: Sequence[Delta], fresh: int) -> tuple[Array, Array]:
    """Of the pairs in the order of `pairs_of`: ⟨ΔW_i, ΔW_j⟩ and ‖ΔW_i·ΔW_jᵀ‖_F², each of shape (pairs,).

    s_i·s_j·Σ[(B_iᵀB_j) ∘ C] and (s_i·s_j)²·Σ[(B_iᵀB_i·C) ∘ (C·B_jᵀB_j)] with C = A_iA_jᵀ.
    """
    b = np.concatenate([delta.b for delta in deltas], axis=1)
    a = np.concatenate([delta.a for delta in deltas], axis=0)
    grams = [delta.b.T @ delta.b for delta in deltas]
    starts = np.cumsum([0, *(delta.a.shape[0] for delta in deltas)])
    inner, overlap = [], []
    for i in range(min(fresh, len(deltas) - 1)):
        after = starts[i + 1]
        b_products, a_products = deltas[i].b.T @ b[:, after:], deltas[i].a @ a[after:].T
        turned = grams[i] @ a_products
        for j in range(i + 1, len(deltas)):
            block = slice(starts[j] - after, starts[j + 1] - after)
            scale = deltas[i].scale * deltas[j].scale
            inner.append(scale * np.vdot(b_products[:, block], a_products[:, block]))
            overlap.append(scale**2 * np.vdot(turned[:, block], a_products[:, block] @ grams[j]))
    return np.array(inner), np.array(overlap)


def _side(vectors: Sequence[Array], top: int, fresh: int) -> tuple[Array, Array]:
    """Principal angles and first-vector agreement of the pairs, from at most `top` orthonormal columns of each run.

    Of a pair as many columns of either as the run of the smaller rank has: the nearest k of more directions would be
    nearer the more there are.
    """
    pairs = pairs_of(len(vectors), fresh)
    widths = np.array([v.shape[1] for v in vectors])
    stacked = np.zeros((vectors[0].shape[0], len(vectors), top))
    for i, v in enumerate(vectors):
        stacked[:, i, : widths[i]] = v
    flat = stacked.reshape(len(stacked), -1)
    overlaps = [
        (flat[:, i * top : (i + 1) * top].T @ flat[:, (i + 1) * top :]).reshape(top, -1, top).transpose(1, 0, 2)
        for i in range(min(fresh, len(vectors) - 1))
    ]
    overlap = np.concatenate(overlaps) if overlaps else np.zeros((0, top, top))
    for n, (i, j) in enumerate(pairs):
        k = min(widths[i], widths[j])
        overlap[n, k:], overlap[n, :, k:] = 0, 0
    # A missing column is a zero column: its cosines are 0 and come last, and are taken out again.
    angles = angles_from_overlap(overlap)
    first = np.abs(overlap[:, 0, 0])
    for n, (i, j) in enumerate(pairs):
        k = min(widths[i], widths[j])
        if k and angles[n, 0] < SMALL_ANGLE:
            angles[n, :k] = with_small_angles(angles[n, :k], vectors[i][:, :k], vectors[j][:, :k], overlap[n, :k, :k])
        angles[n, k:] = np.nan
        first[n] = first[n] if k else np.nan
    return angles, first


def _in_parallel(measure: Callable[[str], _Module], modules: Sequence[str]) -> Iterator[_Module]:
    """Several modules at once, each on one core: the factors are too thin for one product to fill many."""
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(_WORKERS) as pool:
        yield from pool.map(measure, modules)


def padded(rows: Sequence[Array]) -> Array:
    """The rows under each other, filled up with NaN."""
    filled = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled
