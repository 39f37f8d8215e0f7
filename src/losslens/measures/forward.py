"""Forward passes of the base with interpolated updates over fixed sequences: losses and hidden states."""

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
from losslens.measures.connectivity import SequenceNll
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
        chosen = logits[scored].to(torch.promote_types(logits.dtype, torch.float32))
        per_token = torch.nn.functional.cross_entropy(chosen, ids[:, 1:][scored], reduction="none")
        rows = scored.nonzero()[:, 0]
        sums = torch.zeros(len(indices), dtype=torch.float64, device=ids.device).index_add(0, rows, per_token.double())
        nll[indices] = sums.cpu().numpy()
    return SequenceNll(nll, tokens)


@torch.inference_mode()
def hidden_states(model: Any, sequences: Sequences, pooling: Pooling, batch_size: int) -> Iterator[Array]:
    """Computes features of the sequences, batch by batch and in order, shape (layers + 1, sequences, d).

    Features are all hidden states of the model: the embeddings and the output of each layer (the last one after the
    final norm), pooled to the mean over the completion's tokens or to its last token (`pooling`).
    """
    for _, ids, mask, completion in _batches(sequences, batch_size, model.device, in_order=True):
        states = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
        if pooling == "mean":
            weights = completion.double() / completion.sum(dim=1, keepdim=True)
        else:
            last = mask.sum(dim=1) - 1
            weights = torch.zeros_like(mask, dtype=torch.float64).scatter(1, last[:, None], 1.0)
        yield np.stack([torch.einsum("bt,btd->bd", weights, state.double()).cpu().numpy() for state in states])


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
