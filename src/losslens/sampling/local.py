"""Completions from a causal language model: greedy, independent of the batch size, or sampled and seeded."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.models.tokens import chat_turns, decode, encode_prompt

# Two logits nearer than this may swap places when the same sequence is computed in another batch shape. Measured on
# the tiny student in float32: batching moves a logit by less than 1e-4 (tests/test_generation.py).
_CLOSE_CALL = {torch.float32: 1e-3, torch.float64: 1e-9}


def generate_greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    description: str = "greedy",
    journal: Journal | None = None,
) -> list[Completion]:
    """Greedy completions of `prompts`, the same whatever `batch_size` is.

    Matrix products round differently in different shapes, so a greedy choice between two almost equal logits can
    depend on the batch. Whenever a sequence met such a close call, its prompt is decoded again alone, without
    padding: that result depends on nothing but the model and the prompt. In half precision, where batching moves
    logits by more than any useful threshold, no such promise is made.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Users' turns.
        max_new_tokens: Where a completion is cut.
        batch_size: Sequences at once.
        description: Of the progress bar.
        journal: Takes each batch's completions, by the prompt's number; what is in it is not made again.
    """
    threshold = _CLOSE_CALL.get(model.dtype, 0.0)
    config: dict[str, Any] = {"do_sample": False}
    known = dict(journal.completions) if journal else {}
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # Not by whole batches: it may go on with another batch size.
    missing = [i for i in range(len(encoded)) if str(i) not in known]
    for rows in _batches(missing, batch_size, description):
        indices = [missing[row] for row in rows]
        batch, gaps = _generate(model, tokenizer, [encoded[i] for i in indices], max_new_tokens, config)
        for row, gap in enumerate(gaps):
            if gap < threshold and len(indices) > 1:
                [batch[row]], _ = _generate(model, tokenizer, [encoded[indices[row]]], max_new_tokens, config)
        made = {str(i): completion for i, completion in zip(indices, batch, strict=True)}
        known.update(made)
        if journal is not None:
            journal.add(made)
    return [known[str(i)] for i in range(len(encoded))]


def generate_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    description: str = "sample",
    journal: Journal | None = None,
) -> list[list[Completion]]:
    """`samples` independent completions of each of `prompts`, in their order.

    The result depends on `seed` and on `batch_size`, not on the state of the global generator, which is put back.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Users' turns.
        samples: Completions of each.
        temperature: Of the softmax.
        top_p: Share of the probability mass that is sampled from.
        max_new_tokens: Where a completion is cut.
        batch_size: Sequences at once.
        seed: Of the generator.
        description: Of the progress bar.
        journal: Takes each batch's completions, by number (prompt · samples + sample), and the generator's state after
            it, so that the rest of an interrupted call is what it would have been.
    """
    config: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(samples)]
    cuda = model.device.type == "cuda"
    known: dict[str, Completion] = {}
    with torch.random.fork_rng(devices=[model.device] if cuda else []):
        torch.manual_seed(seed)
        # Another kind of device draws otherwise: what was begun there does not go on here.
        kind, _, state = (journal.state or "").partition(":") if journal else ("", "", "")
        if journal is not None and kind == model.device.type:
            known = journal.up_to_state()
            if set(known) != {str(i) for i in range(len(known))}:  # with a gap the generator's state fits no more
                raise InputError(f"{journal.file}: completions are missing in it; delete it to sample them again")
            tensor = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
            torch.cuda.set_rng_state(tensor, model.device) if cuda else torch.set_rng_state(tensor)
        elif journal is not None:
            journal.clear()
        for indices in _batches(encoded, batch_size, description):
            if str(indices[0]) in known:
                continue
            batch, _ = _generate(model, tokenizer, [encoded[i] for i in indices], max_new_tokens, config)
            made = {str(i): completion for i, completion in zip(indices, batch, strict=True)}
            known.update(made)
            if journal is not None:
                now = torch.cuda.get_rng_state(model.device) if cuda else torch.get_rng_state()
                journal.add(made, f"{model.device.type}:{base64.b64encode(now.numpy().tobytes()).decode()}")
    return [[known[str(i + j)] for j in range(samples)] for i in range(0, len(encoded), samples)]


def _batches(encoded: Sequence[Any], batch_size: int, description: str) -> Iterable[range]:
    starts = range(0, len(encoded), batch_size)
    ranges = [range(start, min(start + batch_size, len(encoded))) for start in starts]
    shown: Iterable[range] = tqdm(ranges, desc=description, unit="batch", leave=False, dynamic_ncols=True)
    return shown


class _TopTwoGap(LogitsProcessor):
    """Notes, for each sequence, the smallest gap between its two largest logits at any step it was still open."""

    def __init__(self, prompt_length: int, eos_ids: torch.Tensor) -> None:
        self.prompt_length = prompt_length
        self.eos_ids = eos_ids
        self.smallest: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        top = scores.topk(2, dim=-1).values
        gap = top[:, 0] - top[:, 1]
        if self.smallest is None:
            self.smallest = gap
        else:
            closed = torch.isin(input_ids[:, self.prompt_length :], self.eos_ids).any(dim=1)
            self.smallest = torch.where(closed, self.smallest, torch.minimum(self.smallest, gap))
        return scores


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    max_new_tokens: int,
    config: dict[str, Any],
) -> tuple[list[Completion], list[float]]:
    """One batch, padded on the left; the completions and each one's smallest gap between its top two logits."""
    pad_id = tokenizer.pad_token_id
    width = max(len(ids) for ids in encoded)
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
    declared = model.generation_config.eos_token_id
    eos_ids = sorted({*chat_turns(tokenizer).ends, *([declared] if isinstance(declared, int) else declared or [])})
    gaps = _TopTwoGap(width, torch.tensor(eos_ids, device=model.device))
    # What a configuration leaves open is filled from the model's own settings: its penalties, its top-k.
    own, model.generation_config = model.generation_config, GenerationConfig()
    training = model.training
    model.eval()
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=eos_ids, **config
            ),
            logits_processor=LogitsProcessorList([gaps]),
        )
    finally:
        model.generation_config = own
        model.train(training)
    completions = []
    for ids in output[:, width:].tolist():
        end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
        ids = ids if end is None else ids[: end + 1]
        # What stands inside is kept, special or not: the marks of thinking, say. Only the end is no part of the text.
        text = decode(tokenizer, ids if end is None else ids[:end])
        completions.append(Completion(text, len(ids), end is not None, ids=tuple(ids)))
    assert gaps.smallest is not None
    return completions, gaps.smallest.tolist()
