"""Next-token distributions in little memory: which tokens are kept of a model's outputs at each position.

Small vocabularies are kept whole. Of a large one, the base's likeliest tokens at each position are kept, and all others
together as one further token; divergences of such merged distributions are lower bounds (data processing inequality).
"""

from __future__ import annotations

import torch

# Vocabularies up to this size are kept whole.
EXACT_UP_TO = 512
LIKELIEST = 64
# Positions whose distributions over the whole vocabulary are in memory at once.
AT_ONCE = 512


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
    for some, kept in zip(logits.split(AT_ONCE), tokens.split(AT_ONCE), strict=True):
        log_probs = some.to(torch.promote_types(some.dtype, torch.float32)).log_softmax(dim=-1)
        if kept.shape[1]:
            others = log_probs.scatter(1, kept, -torch.inf).logsumexp(dim=-1, keepdim=True)
            log_probs = torch.cat([log_probs.gather(1, kept), others], dim=-1)
        parts.append(log_probs)
    return torch.cat(parts) if parts else logits.new_zeros(0, max(tokens.shape[1] + 1, 1))
