"""Unbiased linear CKA of hidden states, from one forward pass per model.

Only the U-centred Gram matrices of the sequences are kept for each layer and minibatch; their size n×n does not depend
on the width of the model. The CKA of a pair of models is then a ratio of sums of products of these matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array


@dataclass(frozen=True)
class Similarities:
    """U-centred Gram matrices of one model's features; L layers, P values.

    Attributes:
        whole: The matrices over all feature dimensions: all minibatches of each layer, flattened, shape (L, P).
        without_outlier: The same without one dimension of each layer.
        outliers: Index of that dimension, shape (L,).
        n: Number of sequences.
    """

    whole: Array
    without_outlier: Array
    outliers: np.ndarray
    n: int


@dataclass(frozen=True)
class CkaOfPair:
    """CKA of two models on the same sequences; one value per hidden state, the embeddings first.

    Attributes:
        unbiased: CKA over all feature dimensions, shape (layers + 1,).
        without_outlier: CKA without the base's dimension of largest variance in each layer, shape (layers + 1,).
        outliers: Index of that dimension, shape (layers + 1,).
        n: Number of sequences.
    """

    unbiased: np.ndarray
    without_outlier: np.ndarray
    outliers: np.ndarray
    n: int


def similarities(minibatches: Iterable[Array], outliers: np.ndarray | None = None) -> Similarities:
    """Computes the Gram matrices minibatch by minibatch, without keeping the features.

    Args:
        minibatches: Features, each of shape (L, n, d) with n ≥ 4; L and d the same in all.
        outliers: The dimension of each layer to leave out; by default (used for the base) the one of largest variance
            in the first minibatch.
    """
    whole, without, count = [], [], 0
    for minibatch in minibatches:
        features = minibatch.astype(np.float64)
        rounding = 1e-12 * np.abs(features).max(axis=(1, 2), keepdims=True)
        # HSIC is invariant to an offset, but an offset costs precision.
        features -= features.mean(axis=1, keepdims=True)
        features[np.abs(features) <= rounding] = 0  # constant over the sequences
        if outliers is None:
            outliers = features.var(axis=1).argmax(axis=1)
        gram = features @ features.transpose(0, 2, 1)
        column = np.take_along_axis(features, outliers[:, None, None], axis=2)
        whole.append(_flat(u_centred(gram)))
        without.append(_flat(u_centred(gram - column @ column.transpose(0, 2, 1))))
        count += features.shape[1]
    if outliers is None:
        raise ValueError("no features")
    return Similarities(np.concatenate(whole, axis=1), np.concatenate(without, axis=1), outliers, count)


def u_centred(gram: Array) -> Array:
    """U-centres Gram matrices, shape (…, n, n), so that ⟨K̃, L̃⟩/(n(n − 3)) is the unbiased HSIC₁(K, L).

    Source: Székely and Rizzo 2014; HSIC₁: Song et al. 2012, used for CKA by Nguyen et al. 2021 (arXiv 2010.15327).

    Raises:
        ValueError: n < 4, where the unbiased HSIC is undefined.
    """
    n = gram.shape[-1]
    if n < 4:
        raise ValueError(f"unbiased CKA needs minibatches of at least 4 sequences, not {n}")
    diagonal = np.arange(n)
    centred = gram.copy()
    centred[..., diagonal, diagonal] = 0
    rows = centred.sum(axis=-1)
    total = rows.sum(axis=-1)[..., None, None]
    centred += total / ((n - 1) * (n - 2)) - (rows[..., :, None] + rows[..., None, :]) / (n - 2)
    centred[..., diagonal, diagonal] = 0
    return centred


def cka(first: Array, second: Array) -> Array:
    """Computes CKA by layer, (L, P) to (L,), from U-centred Gram matrices: Σ HSIC(K, L)/√(Σ HSIC(K, K)·Σ HSIC(L, L)).

    The sums run over the minibatches and are divided once, at the end. Values are not clipped: unrelated features give
    values around 0, of either sign. NaN where a model's own HSIC is not positive.
    """
    own = np.sum(first**2, axis=1) * np.sum(second**2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(own > 0, np.sum(first * second, axis=1) / np.sqrt(own), np.nan)


def minibatch_sizes(n: int, size: int) -> list[int]:
    """Returns minibatch sizes for `n` sequences: about equal, at least 4, at most `size` if possible.

    All minibatches have the same weight, so a short one would add the noise of few sequences to the sum.
    """
    count = max(1, min(-(-n // size), n // 4))
    return [n // count + (number < n % count) for number in range(count)]


def minibatches_of(features: Iterable[Array], sizes: Iterable[int]) -> Iterator[Array]:
    """Regroups features of shape (L, n, d) into minibatches of the given `sizes`, which must sum to the total n."""
    parts = iter(features)
    rest: Array | None = None
    for size in sizes:
        pending = [] if rest is None else [rest]
        while sum(part.shape[1] for part in pending) < size:
            pending.append(next(parts))
        joined = np.concatenate(pending, axis=1)
        yield joined[:, :size]
        rest = joined[:, size:]


def _flat(gram: Array) -> Array:
    # Weighted by 1/(n(n − 3)), so that the products sum to a sum of HSICs.
    n = gram.shape[-1]
    flat: Array = gram.reshape(len(gram), -1) / np.sqrt(n * (n - 3))
    return flat
