"""Next-token distributions on fixed sequences: KL to the base, output shift and Jensen–Shannon divergence.

Small vocabularies are kept whole. Of a large one, the base's likeliest tokens at each position are kept, and all others
together as one further token; divergences of such merged distributions are lower bounds (data processing inequality).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from losslens.updates.base import Array

# Vocabularies up to this size are kept whole.
EXACT_UP_TO = 512
LIKELIEST = 64
# Positions whose distributions over the whole vocabulary are in memory at once.
_AT_ONCE = 512


def likeliest_tokens(logits: torch.Tensor, count: int = LIKELIEST, exact_up_to: int = EXACT_UP_TO) -> torch.Tensor:
    """Returns the tokens to keep at each position, shape (T, count), or (T, 0) to keep the whole vocabulary.

    Args:
        logits: The base's logits, shape (T, V).
        count: Number of tokens kept.
        exact_up_to: Vocabularies up to this size are kept whole.
    """
    if logits.shape[-1] <= max(exact_up_to, count + 1):
        return torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
    return logits.topk(count, dim=-1).indices


def kept_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Computes log-probabilities of the kept tokens, and in a last column of all others together.

    Args:
        logits: Logits, shape (T, V).
        tokens: The tokens of `likeliest_tokens`, shape (T, K).

    Returns:
        Shape (T, K + 1), or (T, V) if the whole vocabulary is kept; in float32 or better.
    """
    parts = []
    for some, kept in zip(logits.split(_AT_ONCE), tokens.split(_AT_ONCE), strict=True):
        log_probs = some.to(torch.promote_types(some.dtype, torch.float32)).log_softmax(dim=-1)
        if kept.shape[1]:
            others = log_probs.scatter(1, kept, -torch.inf).logsumexp(dim=-1, keepdim=True)
            log_probs = torch.cat([log_probs.gather(1, kept), others], dim=-1)
        parts.append(log_probs)
    return torch.cat(parts) if parts else logits.new_zeros(0, max(tokens.shape[1] + 1, 1))


def kl(first: Array, second: Array) -> Array:
    """Computes KL(first ‖ second) in nats at each position, shape (T,), from log-probabilities of shape (T, K).

    Each term is p·log(p/q) − p + q, which is never negative, so that rounding cannot make a KL negative.
    """
    p, q = first.astype(np.float64), second.astype(np.float64)
    difference = p - q
    values: Array = np.sum(np.exp(p) * (difference + np.expm1(-difference)), axis=-1)
    return np.maximum(values, 0.0)


def jensen_shannon(first: Array, second: Array) -> float:
    """Computes the Jensen–Shannon divergence in nats, mean over positions, from log-probabilities of shape (T, K).

    Source: Lin 1991; symmetric, 0 for equal distributions and at most ln 2.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    p, q = np.exp(a), np.exp(b)
    middle = np.log((p + q) / 2)
    # In each token the sum is not negative, since the middle is the mean of the two.
    terms = np.maximum(p * (a - middle) + q * (b - middle), 0.0)
    return float(np.sum(terms) / (2 * len(a))) if len(a) else float("nan")


def output_shifts(base: Array, models: Sequence[Array]) -> Array:
    """Computes output shifts as vectors whose inner products are mean_t Cov_π₀(F_a, F_b), shape (models, T·K).

    F = log π − log π₀ is centred under the base's distribution π₀ at each position, then weighted by √(π₀/T).

    Args:
        base: Log-probabilities of the base, shape (T, K).
        models: Those of each model, same shape.
    """
    logs = base.astype(np.float64)
    probabilities = np.exp(logs)
    weights = np.sqrt(probabilities / max(len(logs), 1))
    vectors = np.empty((len(models), logs.size))
    for vector, model in zip(vectors, models, strict=True):
        shift = model - logs
        shift -= np.sum(probabilities * shift, axis=-1, keepdims=True) / probabilities.sum(axis=-1, keepdims=True)
        vector[:] = (weights * shift).reshape(-1)
    return vectors


def cosines(first: NDArray[np.floating], second: NDArray[np.floating]) -> Array:
    """Computes the cosine of each row of `first` with each of `second`, shape (m, n); NaN for zero rows."""
    norms = np.outer(np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1))
    found: Array = np.divide(
        first @ second.T, norms, dtype=np.float64, out=np.full(norms.shape, np.nan), where=norms > 0
    )
    return found
