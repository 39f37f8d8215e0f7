"""Merges of the updates of two runs in one module: sum, mean, TIES and DARE.

All of them merge ΔW. Merging the factors of LoRA instead would mix the B of one run with the A of the other.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from losslens.updates.base import Array, Update
from losslens.updates.dense import DenseUpdate

Merge = Literal["sum", "mean", "ties", "dare"]

# The settings of the papers: TIES keeps the largest 20% of the entries, DARE drops 90% of them at random.
KEPT_BY_TIES, DROPPED_BY_DARE = 0.2, 0.9


def merged(how: Merge, first: Update, second: Update, rng: np.random.Generator) -> Update:
    """Merges two updates of one module.

    Args:
        how: `sum` (task arithmetic with λ = 1; Ilharco et al. 2023, arXiv 2212.04089); `mean`, half of it; `ties`
            (`ties`); `dare`, the mean of the two after `dare`.
        first: ΔW of the one run.
        second: ΔW of the other run.
        rng: The generator of DARE's masks; the other merges leave it as it is.
    """
    if how in ("sum", "mean"):
        share = 1.0 if how == "sum" else 0.5
        if type(first) is type(second):
            return share * first + share * second
        return DenseUpdate(share * (first.dense() + second.dense()))
    if how == "ties":
        return DenseUpdate(ties([first.dense(), second.dense()]))
    return DenseUpdate((dare(first.dense(), rng) + dare(second.dense(), rng)) / 2)


def ties(updates: list[Array], kept: float = KEPT_BY_TIES) -> Array:
    """Merges updates by TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1) with λ = 1.

    Trim: each update keeps the share `kept` of its entries with the largest magnitude. Elect: the sign of an entry is
    that of the sum over the trimmed updates. Merge: the mean over those trimmed updates whose entry has this sign.
    Entries are trimmed within a module, as PEFT does it; the paper trims over all modules together.

    Args:
        updates: ΔW of each run, shape (out, in).
        kept: Share of the entries that each update keeps.
    """
    trimmed = np.stack([_trimmed(update, kept) for update in updates])
    agree = np.sign(trimmed) == np.sign(trimmed.sum(axis=0))
    count = np.sum(agree & (trimmed != 0), axis=0)
    result: Array = np.sum(trimmed * agree, axis=0) / np.maximum(count, 1)
    return result


def dare(update: Array, rng: np.random.Generator, dropped: float = DROPPED_BY_DARE) -> Array:
    """Drops entries at random and rescales the others by 1/(1 − p) (Yu et al. 2023, arXiv 2311.03099, equation 1).

    Args:
        update: ΔW, shape (out, in).
        rng: The generator of the mask.
        dropped: p, the probability with which an entry is dropped.
    """
    return np.where(rng.random(update.shape) < dropped, 0.0, update / (1 - dropped))


def _trimmed(update: Array, kept: float) -> Array:
    count = int(kept * update.size)
    if not count:
        return np.zeros_like(update)
    smallest = np.partition(np.abs(update).ravel(), update.size - count)[update.size - count]
    return np.where(np.abs(update) >= smallest, update, 0.0)
