"""Shifts of hidden states by an update, by position in the sequence and by layer; the rank of a representation.

Hidden states are given as arrays of shape (positions, L, n, d): L hidden states of each model (the embeddings first)
for n sequences.
"""

from __future__ import annotations

import numpy as np

from losslens.updates.base import Array

# The positions at which states are kept: the prompt's last token, the mean over the completion's first three tokens,
# and the mean over all of its tokens.
POSITIONS = ("prompt", "start", "completion")
FIRST_TOKENS = 3
PROMPT, COMPLETION = POSITIONS.index("prompt"), POSITIONS.index("completion")


def shift_cosine(first: Array, second: Array) -> Array:
    """Computes Σ_n⟨δ_a, δ_b⟩/√(Σ_n‖δ_a‖²·Σ_n‖δ_b‖²) by position and layer, shape (positions, L).

    Args:
        first: Shifts δ_a = h_a − h₀, shape (positions, L, n, d).
        second: Shifts δ_b, same shape.

    Returns:
        The cosines; NaN where a model does not shift the state.
    """
    inner = np.einsum("plnd,plnd->pl", first, second, dtype=np.float64)
    norms = np.sqrt(_squared(first)) * np.sqrt(_squared(second))
    found: Array = np.divide(inner, norms, out=np.full(norms.shape, np.nan), where=norms > 0)
    return found


def shift_size(shift: Array, base: Array) -> Array:
    """Computes the root mean square of ‖δ‖ over that of ‖h₀‖ by position and layer, shape (positions, L).

    Args:
        shift: Shifts δ = h − h₀, shape (positions, L, n, d).
        base: Hidden states h₀ of the base, same shape.
    """
    size, of = np.sqrt(_squared(shift)), np.sqrt(_squared(base))
    relative: Array = np.divide(size, of, out=np.full(size.shape, np.nan), where=of > 0)
    return relative


def participation_ratio(states: Array) -> float:
    """Computes (Σλ)²/Σλ² of the covariance's eigenvalues λ: the number of dimensions that the states fill.

    Between 1 and min(n − 1, d); NaN if all states are equal. Source: Gao et al. 2017.

    Args:
        states: Hidden states of one layer, shape (n, d).
    """
    centred = states.astype(np.float64)
    centred = centred - centred.mean(axis=0)
    # Of both Gram matrices, which have the same eigenvalues but for zeros, the smaller one.
    gram = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    squares = float(np.sum(gram**2))
    return float(np.trace(gram)) ** 2 / squares if squares > 0 else float("nan")


def _squared(values: Array) -> Array:
    sums: Array = np.einsum("plnd,plnd->pl", values, values, dtype=np.float64)
    return sums
