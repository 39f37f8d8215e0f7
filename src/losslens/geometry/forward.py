"""Models that carry a combination of updates, and what one forward pass over fixed sequences tells about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from losslens.errors import InputError, first_line
from losslens.geometry.comparison import Updates
from losslens.geometry.connectivity import SequenceLosses
from losslens.geometry.subspaces import Array
from losslens.models import as_it_was

Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Sequences:
    """Fixed sequences that every model is shown.

    Attributes:
        prompts: Token ids of each prompt.
        completions: Token ids of each completion, at least one.
    """

    prompts: list[list[int]]
    completions: list[list[int]]


@contextmanager
def carrying_line(
    base: Any, modules: Sequence[str], *updates: Updates
) -> Iterator[tuple[Any, Callable[[Sequence[float]], None]]]:
    """The base with Σ w_i·ΔW_i on it, exact and unmerged; afterwards the base is as it was.

    The sum of updates of ranks r_i is one adapter of rank Σ r_i: the factors √(w_i·s_i)·B_i beside and
    √(w_i·s_i)·A_i under each other. Interpolating A and B apart would add the cross terms B_i·A_j.

    Args:
        base: The model without an adapter.
        modules: Names of the adapted modules.
        updates: What to add.

    Yields:
        The model, and a function that sets the weights w_i ≥ 0; they are to be set before the first pass.

    Raises:
        InputError: The base has no such module, or one of another shape.
    """
    from peft import LoraConfig, get_peft_model

    ranks = {module: sum(update[module].a.shape[0] for update in updates) for module in modules}
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        rank_pattern=ranks,
        alpha_pattern=ranks,  # alpha / r = 1: the scales are in the factors
        target_modules=list(modules),
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    with as_it_was(base):
        try:
            with torch.random.fork_rng():
                model = get_peft_model(base, config).eval()
        except ValueError as error:
            raise InputError(f"the adapters do not fit the base: {first_line(error)}") from error
        layers = {module: model.get_base_model().get_submodule(module) for module in modules}
        for module, layer in layers.items():
            delta = updates[0][module]
            shape = (layer.lora_B["default"].weight.shape[0], layer.lora_A["default"].weight.shape[1])
            if shape != (delta.b.shape[0], delta.a.shape[1]):
                raise InputError(f"the adapters do not fit the base: {module} has another shape there")

        @torch.no_grad()
        def set_weights(weights: Sequence[float]) -> None:
            for module, layer in layers.items():
                deltas = [update[module] for update in updates]
                roots = [np.sqrt(weight * abs(delta.scale)) for weight, delta in zip(weights, deltas, strict=True)]
                signs = [np.sign(delta.scale) for delta in deltas]
                b = np.concatenate([r * sign * d.b for r, sign, d in zip(roots, signs, deltas, strict=True)], axis=1)
                a = np.concatenate([r * d.a for r, d in zip(roots, deltas, strict=True)], axis=0)
                layer.lora_B["default"].weight.copy_(torch.from_numpy(b))
                layer.lora_A["default"].weight.copy_(torch.from_numpy(a))

        yield model, set_weights


@torch.inference_mode()
def losses(model: Any, sequences: Sequences, batch_size: int) -> SequenceLosses:
    """The loss of each completion, teacher-forced, in float32 or better."""
    nll, tokens = np.zeros(len(sequences.prompts)), np.array([len(ids) for ids in sequences.completions])
    for indices, ids, mask, completion in _batches(sequences, batch_size, model.device):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        scored = completion[:, 1:]
        chosen = logits[scored].to(torch.promote_types(logits.dtype, torch.float32))
        per_token = torch.nn.functional.cross_entropy(chosen, ids[:, 1:][scored], reduction="none")
        rows = scored.nonzero()[:, 0]
        sums = torch.zeros(len(indices), dtype=torch.float64, device=ids.device).index_add(0, rows, per_token.double())
        nll[indices] = sums.cpu().numpy()
    return SequenceLosses(nll, tokens)


@torch.inference_mode()
def hidden_states(model: Any, sequences: Sequences, pooling: Pooling, batch_size: int) -> Iterator[Array]:
    """Features of the sequences, batch by batch and in their order: shape (layers + 1, sequences, d).

    Every hidden state that the model gives: the embeddings, and the output of each layer (the last one after the final
    norm). `pooling` says of which positions: the mean over the completion's tokens, or its last token.
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
    """Right-padded batches: numbers of the sequences, token ids, attention mask, and which tokens are completion."""
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
