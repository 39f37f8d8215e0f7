"""Quantities of whole next-token distributions, from the last hidden states and the language-model head.

The logits of a batch never exist at once: both functions go over completion positions in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from losslens.core.errors import InputError
from losslens.losses import Loss, Need
from losslens.training.lm_head import has_plain_head
from losslens.training.trl_internals import ChunkedDivergenceFunction

# Needs of a loss that this module computes.
NEEDS: frozenset[Need] = frozenset({"top_entropy", "divergence"})
# Tokens of `top_entropy`, and positions whose logits exist at once.
_TOP, _CHUNK = 20, 1024


def require_computable(model: PreTrainedModel, loss: Loss) -> None:
    """Checks that the distributions that a loss needs can be computed from the model's hidden states and head.

    The head itself is never adapted (`models.adapters`).

    Args:
        model: The causal language model inside the PEFT model.
        loss: The loss.

    Raises:
        InputError: The model scales or caps its logits, or the installed TRL is too old.
    """
    needs = sorted(loss.needs & NEEDS)
    if not needs:
        return
    if not has_plain_head(model):
        raise InputError(
            f"method={loss.name} needs whole next-token distributions ({', '.join(needs)}), which are not implemented "
            f"for models that scale or cap their logits, such as {model.config.model_type}"
        )
    if "divergence" in needs and ChunkedDivergenceFunction is None:
        raise InputError(f"method={loss.name} needs trl>=1.16")


@contextmanager
def captured_hidden_states(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states, shape (N, T + 1, H), of each forward pass of a model within the block."""
    states: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
    try:
        yield states
    finally:
        hook.remove()


@torch.no_grad()
def top_entropy(head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Computes the entropy of the 20 most likely tokens, renormalised; see `Batch.top_entropy`.

    Args:
        head: The language-model head.
        hidden: Last hidden states, shape (M, H).

    Returns:
        Shape (M,), float32, nats.
    """
    entropies = []
    for chunk in hidden.detach().split(_CHUNK):
        logits = head(chunk).float()
        log_probs = logits.topk(min(_TOP, logits.shape[-1])).values.log_softmax(dim=-1)
        entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
    return torch.cat(entropies)


def divergence(head: torch.nn.Linear, hidden: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Computes KL(π_ref ‖ π_θ) over the whole vocabulary, with gradient to `hidden`.

    Args:
        head: The language-model head, which π_ref and π_θ share.
        hidden: Last hidden states under π_θ, shape (M, H).
        reference: Last hidden states under π_ref, shape (M, H).

    Returns:
        Shape (M,), float32, nats.
    """
    weight, bias = head.weight, head.bias
    # The last argument chooses the divergence: 0 is the forward KL, from the second distribution to the first.
    values: torch.Tensor = ChunkedDivergenceFunction.apply(hidden, weight, bias, reference, weight, bias, 0.0)[0]
    return values
