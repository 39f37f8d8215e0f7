"""Forward passes of the base with interpolated updates over fixed sequences: losses, outputs and hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from losslens.core.errors import InputError
from losslens.measures.activations import FIRST_TOKENS, POSITIONS
from losslens.measures.connectivity import SequenceNll
from losslens.measures.kept_tokens import AT_ONCE, kept_log_probs, likeliest_tokens
from losslens.models.loading import preserved
from losslens.updates.base import Array, Updates, forward_matrices

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Sequences:
    """Fixed sequences on which all models are run.

    Attributes:
        prompts: Token ids of each prompt.
        completions: Token ids of each completion, at least one token each.
    """

    prompts: list[list[int]]
    completions: list[list[int]]


@contextmanager
def interpolated_model(
    base: Any, modules: Sequence[str], *updates: Updates
) -> Iterator[tuple[Any, Callable[[Sequence[float]], None]]]:
    """Adds Σ w_i·ΔW_i to the base, exactly and unmerged; restores the base on exit.

    The product of the updates with a module's input is added to its output, in float32 or better.

    Args:
        base: The model without an adapter.
        modules: Names of the adapted modules.
        updates: The updates ΔW_i.

    Yields:
        The model, and a function that sets the weights w_i ≥ 0; call it before the first forward pass.

    Raises:
        InputError: The base lacks a module, or its shape differs.
    """
    added: dict[str, list[torch.Tensor]] = {}
    originals = {module: base_weight(base, module, updates[0][module].shape) for module in modules}

    @torch.no_grad()
    def set_weights(weights: Sequence[float]) -> None:
        for module, weight in originals.items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            matrices = forward_matrices([update[module] for update in updates], weights)
            added[module] = [torch.from_numpy(matrix).to(weight.device, dtype) for matrix in matrices]

    def add(module: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        product = inputs[0].to(added[module][0].dtype)
        for matrix in added[module]:
            product = torch.nn.functional.linear(product, matrix)
        return (output + product).to(output.dtype)

    with preserved(base):
        for module in modules:
            base.get_submodule(module).register_forward_hook(partial(add, module))
        yield base.eval(), set_weights


def base_weight(base: Any, module: str, shape: tuple[int, int]) -> torch.Tensor:
    """Returns the weight of a linear module, checked to have `shape` (out, in).

    Raises:
        InputError: The base lacks the module, or its shape differs.
    """
    try:
        layer = base.get_submodule(module)
        weight: torch.Tensor = layer.weight.detach()
    except AttributeError as error:
        raise InputError(f"the adapters do not fit the base: it has no module {module} with a weight") from error
    weight = weight.T if isinstance(layer, Conv1D) else weight  # GPT-2 stores it as (in, out)
    if weight.shape != shape:
        raise InputError(
            f"the adapters do not fit the base: {module} has shape {shape} in the adapters and {tuple(weight.shape)} "
            "in the base"
        )
    return weight


@torch.inference_mode()
def sequence_losses(model: Any, sequences: Sequences, batch_size: int) -> SequenceNll:
    """Computes the teacher-forced loss of each completion, in float32 or better."""
    nll, tokens = np.zeros(len(sequences.prompts)), np.array([len(ids) for ids in sequences.completions])
    for indices, ids, mask, completion in _batches(sequences, batch_size, model.device):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        scored = completion[:, 1:]
        nll[indices] = _nll(logits[scored], ids, scored, len(indices))
    return SequenceNll(nll, tokens)


@dataclass(frozen=True)
class Batch:
    """Results of a forward pass over a few of the sequences: n sequences, t scored tokens.

    Attributes:
        nll: −log π(completion | prompt) of each sequence in nats, summed over its tokens, shape (n,).
        log_probs: Log-probabilities of the kept tokens at each scored position, shape (t, K) (`measures.outputs`).
        tokens: The kept tokens, shape (t, K − 1), or (t, 0) if the whole vocabulary is kept.
        states: Hidden states by position, shape (positions, L, n, d) (`measures.activations`); None if not asked for.
        features: Hidden states pooled for CKA, shape (L, n, d); None if not asked for.
    """

    nll: Array
    log_probs: Array
    tokens: np.ndarray
    states: Array | None
    features: Array | None


@torch.inference_mode()
def observe(
    model: Any, sequences: Sequences, batch_size: int, pooling: Pooling | None, tokens: np.ndarray | None = None
) -> Iterator[Batch]:
    """Runs a model once over the sequences, batch by batch and in order, and keeps all that measures need.

    Hidden states are all those of the model: the embeddings and the output of each layer (the last one after the final
    norm).

    Args:
        model: The model.
        sequences: The sequences.
        batch_size: Sequences per forward pass.
        pooling: The pooling of `Batch.features`: the mean over the completion's tokens, or its last token; None for no
            hidden states.
        tokens: The tokens to keep at each scored position of all sequences; None (used for the base) for its own
            likeliest ones.
    """
    place = 0
    for indices, ids, mask, completion in _batches(sequences, batch_size, model.device, in_order=True):
        output = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=pooling is not None)
        scored = completion[:, 1:]
        logits = output.logits[:, :-1][scored]
        if tokens is None:
            kept = likeliest_tokens(logits)
        else:
            kept = torch.from_numpy(tokens[place : place + len(logits)]).to(ids.device, torch.long)
        place += len(logits)
        states, features = _pooled(output.hidden_states, mask, completion, pooling) if pooling else (None, None)
        yield Batch(
            nll=_nll(logits, ids, scored, len(indices)),
            log_probs=kept_log_probs(logits, kept).to(torch.float32).cpu().numpy(),
            tokens=kept.to(torch.int32).cpu().numpy(),
            states=states,
            features=features,
        )


def _nll(logits: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor, count: int) -> Array:
    """Computes the loss of each of `count` sequences from the logits of the scored positions."""
    parts = [
        torch.nn.functional.cross_entropy(
            some.to(torch.promote_types(some.dtype, torch.float32)), targets, reduction="none"
        )
        for some, targets in zip(logits.split(AT_ONCE), ids[:, 1:][scored].split(AT_ONCE), strict=True)
    ]
    per_token = torch.cat(parts)
    rows = scored.nonzero()[:, 0]
    sums = torch.zeros(count, dtype=torch.float64, device=ids.device).index_add(0, rows, per_token.double())
    nll: Array = sums.cpu().numpy()
    return nll


def _pooled(
    hidden: Sequence[torch.Tensor], mask: torch.Tensor, completion: torch.Tensor, pooling: Pooling
) -> tuple[Array, Array]:
    """Pools hidden states at the positions of `measures.activations`, and for CKA."""
    start, last = completion.int().argmax(dim=1, keepdim=True), mask.sum(dim=1, keepdim=True) - 1
    places = torch.arange(mask.shape[1], device=mask.device)[None]
    chosen = [places == start - 1, completion & (places < start + FIRST_TOKENS), completion]
    chosen += [places == last] * (pooling == "last")
    weights = torch.stack(chosen).double()
    weights /= weights.sum(dim=2, keepdim=True)
    pooled = np.stack([torch.einsum("pbt,btd->pbd", weights, state.double()).cpu().numpy() for state in hidden], axis=1)
    return pooled[: len(POSITIONS)].astype(np.float32), pooled[-1]


def _batches(
    sequences: Sequences, batch_size: int, device: torch.device, in_order: bool = False
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields right-padded batches: sequence indices, token ids, attention mask and completion mask."""
    lengths = [len(p) + len(c) for p, c in zip(sequences.prompts, sequences.completions, strict=True)]
    order = list(range(len(lengths))) if in_order else sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        width = max(lengths[i] for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        mask, completion = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(indices):
            prompt, answer = sequences.prompts[i], sequences.completions[i]
            ids[row, : lengths[i]] = torch.tensor(prompt + answer)
            mask[row, : lengths[i]] = 1
            completion[row, len(prompt) : lengths[i]] = True
        yield indices, ids.to(device), mask.to(device), completion.to(device)
