"""Linear CKA of hidden states, unbiased, from one forward pass a model.

A pass leaves of each layer and minibatch only the U-centred Gram matrix of the sequences, n×n whatever the model's
width. Every pair of models is then a sum of products of these matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from losslens.updates.base import Array


@dataclass(frozen=True)
class Similarities:
    """U-centred Gram matrices of one model's features on some sequences. L layers, P values.

    Attributes:
        whole: Of all feature dimensions: for each layer the matrices of all minibatches, flattened, shape (L, P).
        without_outlier: The same with one dimension left out in each layer.
        outliers: That dimension, shape (L,).
        n: Number of sequences.
    """

    whole: Array
    without_outlier: Array
    outliers: np.ndarray
    n: int


@dataclass(frozen=True)
class CkaOfPair:
    """CKA of two models on the same sequences; one value a hidden state, the embeddings first.

    Attributes:
        unbiased: Of all feature dimensions, shape (layers + 1,).
        without_outlier: Without the base's dimension of largest variance in each layer.
        outliers: That dimension.
        n: Number of sequences.
    """

    unbiased: np.ndarray
    without_outlier: np.ndarray
    outliers: np.ndarray
    n: int


def similarities(minibatches: Iterable[Array], outliers: np.ndarray | None = None) -> Similarities:
    """Takes up features minibatch by minibatch; none is kept.

    Args:
        minibatches: Features, each of shape (L, n, d) with n ≥ 4; L and d the same in all.
        outliers: The dimension of each layer to leave out; by default the one of the largest variance in the first
            minibatch, which is how it is chosen on the base.
    """
    whole, without, count = [], [], 0
    for minibatch in minibatches:
        features = minibatch.astype(np.float64)
        rounding = 1e-12 * np.abs(features).max(axis=(1, 2), keepdims=True)
        # HSIC does not change with an offset, but digits are lost to one.
        features -= features.mean(axis=1, keepdims=True)
        features[np.abs(features) <= rounding] = 0  # the same in all sequences
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
    """Gram matrices, shape (…, n, n), centred so that ⟨K̃, L̃⟩/(n(n − 3)) is the unbiased HSIC₁(K, L).

    Source: Székely and Rizzo 2014; HSIC₁: Song et al. 2012, used for CKA by Nguyen et al. 2021 (arXiv 2010.15327).

    Raises:
        ValueError: n < 4, where it is not defined.
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
    """CKA of each layer from U-centred Gram matrices, shape (L, P) to (L,): Σ HSIC(K, L)/√(Σ HSIC(K, K)·Σ HSIC(L, L)).

    The sums run over the minibatches and are divided once, at the end. Values are not clipped: unrelated features give
    about 0, on either side. NaN where a model's own HSIC is not positive.
    """
    own = np.sum(first**2, axis=1) * np.sum(second**2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(own > 0, np.sum(first * second, axis=1) / np.sqrt(own), np.nan)


def minibatch_sizes(n: int, size: int) -> list[int]:
    """Sizes of minibatches of `n` sequences: about equal, none below 4, at most `size` where that allows it.

    All minibatches weigh the same, so that a short one would bring the noise of few sequences into the sum.
    """
    count = max(1, min(-(-n // size), n // 4))
    return [n // count + (number < n % count) for number in range(count)]


def minibatches_of(features: Iterable[Array], sizes: Iterable[int]) -> Iterator[Array]:
    """Joins features of few sequences, each of shape (L, n, d), to minibatches of `sizes`, which must add up."""
    parts = iter(features)
    rest: Array | None = None
    for size in sizes:
        waiting = [] if rest is None else [rest]
        while sum(part.shape[1] for part in waiting) < size:
            waiting.append(next(parts))
        joined = np.concatenate(waiting, axis=1)
        yield joined[:, :size]
        rest = joined[:, size:]


def _flat(gram: Array) -> Array:
    # Each minibatch is weighted by 1/(n(n − 3)), so that the products add up to a sum of HSICs.
    n = gram.shape[-1]
    flat: Array = gram.reshape(len(gram), -1) / np.sqrt(n * (n - 3))
    return flat
