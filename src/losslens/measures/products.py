"""Singular values and inner products of many adapters at once, for hundreds of adapters and all their pairs.

`comparison` measures every pair in full; here only what cosines and their nulls need is computed, for whole blocks of
adapters in single matrix products. A pair costs 2·r²·(in + out) floating-point operations per module and nothing else
that grows with the number of pairs, each adapter is read once per block, and memory is bounded by the size of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from losslens.measures.comparison import in_parallel, padded
from losslens.measures.int8 import Int8Rows, RoundingNoise, require_vnni, use_one_core
from losslens.measures.views import PairWeights
from losslens.updates.base import Array, Updates

# Of the products of two adapters; what one adapter has alone is computed in float64.
Precision = Literal["float64", "float32", "int8"]
# Bytes of factors that one worker holds: one block of the pairs' first adapters, and one of their second ones.
BLOCK_BYTES = 2**29
# Adapters per matrix product: their r×r products fit into the cache, and BLAS is near its peak.
_TILE = 16


@dataclass(frozen=True)
class Products:
    """Products of N adapters of M modules; P = N(N − 1)/2 pairs in the order of `pairs_of(N, N)`.

    Attributes:
        singular_values: Singular values of each adapter and module, descending, NaN past the rank, shape (N, M, r).
        inner: ⟨ΔW_a, ΔW_b⟩, shape (P, M).
        right_overlap: ‖ΔW_a·ΔW_bᵀ‖_F², shape (P, M).
    """

    singular_values: Array
    inner: Array
    right_overlap: Array


def all_products(
    adapters: Sequence[Updates],
    modules: Sequence[str],
    *,
    precision: Precision = "float32",
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Products:
    """Computes the products of all pairs.

    Norms and singular values are computed in float64; singular values below 1e-8 of the largest are rounding. A cosine
    at the shapes of Qwen3-4B differs from that of float64 by less than 1e-6 in float32, at half the time. In
    int8 (`Int8Rows`), at an eighth of it, it differs by about 1e-4 for ordinary adapters, and by up to 1e-3 for weights
    with outlier columns.

    Args:
        adapters: The updates of each adapter; ranks may differ, shapes of ΔW may not.
        modules: Names of the modules.
        precision: Precision of the products of two adapters.
        block_bytes: Bytes of the factors that a block may have. Adapter i is read once for each block up to its own.
        progress: Wraps the iteration over modules, for a progress bar.

    Raises:
        InputError: int8 on a processor without VNNI.
    """
    if precision == "int8":
        require_vnni()
    pairs = np.triu_indices(len(adapters), 1)
    inner = np.empty((len(pairs[0]), len(modules)))
    overlap = np.empty_like(inner)
    values = []
    measured = in_parallel(
        partial(_of_module, adapters, precision, block_bytes),
        modules,
        start=use_one_core if precision == "int8" else None,
    )
    for number, module in enumerate(progress(measured)):
        values.append(padded(module.values))
        inner[:, number], overlap[:, number] = module.inner[pairs], module.overlap[pairs]
    stacked = np.full((len(adapters), len(modules), max((each.shape[1] for each in values), default=0)), np.nan)
    for number, each in enumerate(values):
        stacked[:, number, : each.shape[1]] = each
    return Products(stacked, inner, overlap)


def product_weights(products: Products, shapes: Sequence[tuple[int, int]], pairs: slice) -> PairWeights:
    """Builds the view of some of the pairs, without angles, and with unknown initial adapters."""
    squared = np.nansum(products.singular_values**2, axis=-1)
    first, second = (index[pairs] for index in np.triu_indices(len(squared), 1))
    outputs, inputs = np.array(shapes, dtype=np.float64).reshape(-1, 2).T
    unknown = np.full((len(first), len(shapes)), np.nan)
    return PairWeights(
        squared_a=squared[first],
        squared_b=squared[second],
        inner=products.inner[pairs],
        right_overlap=products.right_overlap[pairs],
        angles_left=unknown[..., np.newaxis][..., :0],
        angles_right=unknown[..., np.newaxis][..., :0],
        u1=unknown,
        v1=unknown,
        gradients=np.full((*unknown.shape, 4, 4), np.nan),
        gradient_overlap=unknown,
        outputs=outputs,
        inputs=inputs,
        widths=np.zeros_like(unknown),
        inputs_met=unknown,
        same_a=unknown[:, 0] if len(shapes) else np.full(len(first), np.nan),
        draw=lambda _: (float("nan"), float("nan")),
    )


@dataclass
class _Module:
    """Results for one module: singular values by adapter, and symmetric matrices of products, shape (N, N)."""

    values: list[Array]
    inner: Array
    overlap: Array


@dataclass(frozen=True)
class _Tile:
    """Factors of n adapters, padded with zeros to one rank r; ΔW is norm·leftᵀ·right with orthonormal rows of left.

    Attributes:
        numbers: Their numbers, shape (n,).
        norms: Their norms, shape (n,).
        rank: The rank r.
        left: Shape (n·r, out).
        right: Shape (n·r, in).
        noise: Excess that rounding adds to the squared products of `right`, by adapter; None unless it is rounded.
    """

    numbers: NDArray[np.intp]
    norms: Array
    rank: int
    left: NDArray[Any] | Int8Rows
    right: NDArray[Any] | Int8Rows
    noise: RoundingNoise | None = None


def _of_module(adapters: Sequence[Updates], precision: Precision, block_bytes: int, module: str) -> _Module:
    count = len(adapters)
    found = _Module([np.zeros(0)] * count, np.zeros((count, count)), np.zeros((count, count)))
    load = partial(_load, adapters, module, precision, block_bytes, found.values)
    start = 0
    while start < count:
        block, end = load(start)
        for number, tile in enumerate(block):
            for other in block[number:]:
                _fill(found, tile, other)
        after = end
        while after < count:
            others, after = load(after)
            for tile in block:
                for other in others:
                    _fill(found, tile, other)
        start = end
    return found


def _load(
    adapters: Sequence[Updates],
    module: str,
    precision: Precision,
    block_bytes: int,
    values: list[Array],
    start: int,
) -> tuple[list[_Tile], int]:
    """Reads a block of adapters from number `start` on; returns its tiles, and the number of the next adapter."""
    read: list[tuple[int, float, NDArray[Any], NDArray[Any]]] = []
    dtype = np.float64 if precision == "float64" else np.float32
    size, number = 0, start
    while number < len(adapters) and (not read or size < block_bytes):
        left, right = adapters[number][module].orthonormal_factors()
        gram = np.linalg.eigvalsh(right @ right.T)[::-1]
        values[number] = np.sqrt(np.maximum(gram, 0.0))
        # Divided by the norm, so that nothing overflows in float32.
        norm = float(np.linalg.norm(values[number]))
        scaled = right / norm if norm else np.zeros_like(right)
        read.append((number, norm, left.T.astype(dtype), scaled.astype(dtype)))
        size += read[-1][2].nbytes + read[-1][3].nbytes
        number += 1
    read.sort(key=lambda one: len(one[2]))  # adapters of similar rank need little padding
    return [_tile(read, first, precision) for first in range(0, len(read), _TILE)], number


def _tile(read: list[tuple[int, float, NDArray[Any], NDArray[Any]]], first: int, precision: Precision) -> _Tile:
    members = read[first : first + _TILE]
    rank = max(len(left) for _, _, left, _ in members)
    left = np.zeros((len(members), rank, members[0][2].shape[1]), members[0][2].dtype)
    right = np.zeros((len(members), rank, members[0][3].shape[1]), left.dtype)
    for place, (number, norm, rows, columns) in enumerate(members):
        left[place, : len(rows)], right[place, : len(columns)] = rows, columns
        # What was copied is freed, so that a block is never in memory twice.
        read[first + place] = (number, norm, rows[:0].copy(), columns[:0].copy())
    numbers = np.array([number for number, *_ in members])
    flat = left.reshape(len(members) * rank, -1), right.reshape(len(members) * rank, -1)
    norms = np.array([norm for _, norm, *_ in members])
    if precision != "int8":
        return _Tile(numbers, norms, rank, *flat)
    rng = np.random.default_rng(numbers)
    rounded, others = (Int8Rows.rounded(rows, rng) for rows in flat)
    return _Tile(numbers, norms, rank, rounded, others, RoundingNoise.of(right))


def _fill(found: _Module, first: _Tile, second: _Tile) -> None:
    """Computes ⟨ΔW, ΔW'⟩ = Σ (QᵀQ') ∘ (RR'ᵀ) and ‖ΔW·ΔW'ᵀ‖² = ‖RR'ᵀ‖² for ΔW = QR of one tile and ΔW' = Q'R'."""
    shape = (len(first.numbers), first.rank, len(second.numbers), second.rank)
    rights = _products(first.right, second.right).reshape(shape)
    lefts = _products(first.left, second.left).reshape(shape)
    norms = np.outer(first.norms, second.norms)
    inner = norms * np.einsum("irjs,irjs->ij", lefts, rights).astype(np.float64)
    squares = np.einsum("irjs,irjs->ij", rights, rights)
    if first.noise is not None and second.noise is not None:
        squares = np.maximum(squares - first.noise.excess(second.noise), 0)
    overlap = norms**2 * squares.astype(np.float64)
    for matrix, block in ((found.inner, inner), (found.overlap, overlap)):
        matrix[np.ix_(first.numbers, second.numbers)] = block
        matrix[np.ix_(second.numbers, first.numbers)] = block.T


def _products(rows: NDArray[Any] | Int8Rows, others: NDArray[Any] | Int8Rows) -> NDArray[Any]:
    if isinstance(rows, Int8Rows):
        assert isinstance(others, Int8Rows)
        return rows.products(others)
    assert not isinstance(others, Int8Rows)
    return np.asarray(rows @ others.T)
