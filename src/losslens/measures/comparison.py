"""Every run against every other, module by module: what `tables` sums up.

One module's updates of all runs are in memory at a time (one a worker), so memory grows with the number of runs and
not with the model. Of a pair of LoRA updates only r×r and k×k products of the factors are ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from losslens.core.cores import available_cores
from losslens.measures.subspaces import SMALL_ANGLE, angles_from_overlap, principal_angles, with_small_angles
from losslens.updates.base import Array, Update, Updates, pair_products, pairs_of

# More than four modules in memory at once would cost more than they bring.
_WORKERS = min(4, available_cores())


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
    """Principal angles between the inputs that an update may act on and those it might at its start.

    Args:
        start: `input_space` of the initial update; None where that is not known.
        update: The update now.

    Returns:
        Radians, ascending; none where one of the two is not confined to a space (`Update.input_space`).
    """
    now = update.input_space() if start is not None else None
    return np.zeros(0) if start is None or now is None else principal_angles(start, now)


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
