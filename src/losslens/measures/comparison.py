"""Compares every run with every other, module by module; `tables` aggregates the results.

Each worker holds the updates of all runs for one module at a time, so memory grows with the number of runs and not with
the model. For a pair of LoRA updates only r×r and k×k products of the factors are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from losslens.core.cores import available_cores
from losslens.measures.subspaces import SMALL_ANGLE, angles_from_overlap, principal_angles, with_small_angles
from losslens.updates.base import Array, Update, Updates, pair_products, pairs_of

# More than four modules at once use more memory without being faster.
_WORKERS = min(4, available_cores())

_Measured = TypeVar("_Measured")


@dataclass(frozen=True)
class RunGeometry:
    """Geometry of one run; M modules.

    Attributes:
        singular_values: Singular values of each module, descending, NaN past the rank, shape (M, r).
        drift: Principal angles (radians, ascending) between the row spaces of A and of the initial A, NaN past the
            rank and where there is no initial adapter, shape (M, r).
    """

    singular_values: Array
    drift: Array


@dataclass(frozen=True)
class PairGeometry:
    """Geometry of two runs, symmetric in the two; M modules, k angles.

    Attributes:
        inner: ⟨ΔW_a, ΔW_b⟩, shape (M,).
        right_overlap: ‖ΔW_a·ΔW_bᵀ‖_F², shape (M,): how far the two act on the same inputs, whatever their outputs.
        angles_left: Principal angles (radians, ascending) between the top-k left singular subspaces, shape (M, k), k at
            most the largest rank; NaN where a run has fewer directions.
        angles_right: The same on the right.
        u1: |⟨u_1, u_1'⟩| of the top left singular vectors, shape (M,); NaN where a run has none.
        v1: The same for the top right singular vectors.
    """

    inner: Array
    right_overlap: Array
    angles_left: Array
    angles_right: Array
    u1: Array
    v1: Array


def compare(
    adapters: Sequence[Updates],
    modules: Sequence[str],
    *,
    top: int = 10,
    fresh: int | None = None,
    initial: Sequence[Updates | None] | None = None,
    progress: Callable[[Iterable[_Module]], Iterable[_Module]] = iter,
) -> tuple[list[RunGeometry], dict[tuple[int, int], PairGeometry]]:
    """Measures the adapters and compares every two of them.

    Args:
        adapters: The updates of the runs; ranks may differ, shapes of ΔW may not.
        modules: Names of the modules.
        top: k, the number of leading singular directions whose subspaces are compared.
        fresh: Number of leading runs to measure and to compare with each other and with the rest; by default all.
        initial: The adapter that each of the fresh runs started from, if known.
        progress: Wraps the iteration over modules, for a progress bar.

    Returns:
        The geometry of each fresh run, and of each pair of `pairs_of(len(adapters), fresh)`.
    """
    fresh = len(adapters) if fresh is None else fresh
    started_from = list(initial) if initial is not None else [None] * fresh
    measured = list(progress(in_parallel(partial(_measure, adapters, top, fresh, started_from), modules)))
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
    """Results for one module: an entry per fresh run and per pair."""

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
    updates = [adapter[module] for adapter in adapters]
    top = min(top, max(update.rank for update in updates))
    svds = [update.svd(top) for update in updates]
    inner, right_overlap = pair_products(updates, fresh)
    angles_left, u1 = _side([svd.left for svd in svds], top, fresh)
    angles_right, v1 = _side([svd.right for svd in svds], top, fresh)
    starts = {id(start): start[module].input_space() for start in initial if start is not None}
    drifts = [drift(starts.get(id(start)), update) for start, update in zip(initial, updates, strict=False)]
    values = [svd.values for svd in svds[:fresh]]
    return _Module(values, drifts, inner, right_overlap, angles_left, angles_right, u1, v1)


def drift(start: Array | None, update: Update) -> Array:
    """Computes the principal angles between the input space of an update and its initial one.

    Args:
        start: `input_space` of the initial update; None if unknown.
        update: The current update.

    Returns:
        Radians, ascending; empty if either update is not confined to an input space (`Update.input_space`).
    """
    now = update.input_space() if start is not None else None
    return np.zeros(0) if start is None or now is None else principal_angles(start, now)


def _side(vectors: Sequence[Array], top: int, fresh: int) -> tuple[Array, Array]:
    """Computes principal angles and first-vector agreement of the pairs, from at most `top` orthonormal columns each.

    A pair is compared in as many columns as the smaller rank has: with more columns on one side, the nearest k would be
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
    # Missing columns are zero: their cosines are 0, come last and are removed below.
    angles = angles_from_overlap(overlap)
    first = np.abs(overlap[:, 0, 0])
    for n, (i, j) in enumerate(pairs):
        k = min(widths[i], widths[j])
        if k and angles[n, 0] < SMALL_ANGLE:
            angles[n, :k] = with_small_angles(angles[n, :k], vectors[i][:, :k], vectors[j][:, :k], overlap[n, :k, :k])
        angles[n, k:] = np.nan
        first[n] = first[n] if k else np.nan
    return angles, first


def in_parallel(
    measure: Callable[[str], _Measured], modules: Sequence[str], *, start: Callable[[], None] | None = None
) -> Iterator[_Measured]:
    """Measures several modules in parallel, one core each: the factors are too thin to use more for one product.

    Args:
        measure: Measures one module.
        modules: Names of the modules.
        start: Called by each thread when it starts.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(_WORKERS, initializer=start) as pool:
        yield from pool.map(measure, modules)


def padded(rows: Sequence[Array]) -> Array:
    """Stacks rows of different lengths, padded with NaN."""
    filled = np.full((len(rows), max((len(row) for row in rows), default=0)), np.nan)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = values
    return filled
