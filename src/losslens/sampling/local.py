"""Completions from a causal language model: greedy (independent of the batch size) or sampled with a seed."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.models.tokens import chat_turns, decode, encode_prompt

# Two logits closer than this may swap order when the same sequence is computed in a batch of another shape. Measured on
# the tiny student in float32: batching changes a logit by less than 1e-4 (tests/test_generation.py).
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
    """Generates greedy completions of `prompts`, independent of `batch_size`.

    Matrix products round differently for different shapes, so a greedy choice between two almost equal logits can
    depend on the batch. If that happens in a sequence, its prompt is decoded again on its own, without padding; the
    result then depends only on the model and the prompt. In half precision, batching changes logits by more than any
    useful threshold, and completions may depend on `batch_size`.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: User turns.
        max_new_tokens: Maximum length of a completion.
        batch_size: Sequences per batch.
        description: Label of the progress bar.
        journal: Stores each batch's completions by the prompt's index; completions already in it are reused.
    """
    threshold = _CLOSE_CALL.get(model.dtype, 0.0)
    known = dict(journal.completions) if journal else {}
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # By prompt, not by batch, since the batch size may differ when resuming.
    missing = [i for i in range(len(encoded)) if str(i) not in known]
    for rows in _batches(missing, batch_size, description):
        indices = [missing[row] for row in rows]
        batch, gaps = _generate(model, tokenizer, [encoded[i] for i in indices], max_new_tokens)
        for row, gap in enumerate(gaps):
            if gap < threshold and len(indices) > 1:
                [batch[row]], _ = _generate(model, tokenizer, [encoded[indices[row]]], max_new_tokens)
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
    record_logps: bool = False,
) -> list[list[Completion]]:
    """Samples independent completions of each of `prompts`, in order.

    The result depends on `seed` and `batch_size`, not on the state of the global generator, which is restored.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: User turns.
        samples: Completions per prompt.
        temperature: Softmax temperature.
        top_p: Probability mass of nucleus sampling.
        max_new_tokens: Maximum length of a completion.
        batch_size: Sequences per batch.
        seed: Seed of the generator.
        description: Label of the progress bar.
        journal: Stores each batch's completions by index (prompt · samples + sample), and the generator's state after
            the batch, so that an interrupted call resumes with the same samples.
        record_logps: Record the log-probability of each sampled token, as sampled and raw; the samples are the same.
    """
    # Those that `generate` would add for these settings, in its order.
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts for _ in range(samples)]
    cuda = model.device.type == "cuda"
    known: dict[str, Completion] = {}
    with torch.random.fork_rng(devices=[model.device] if cuda else []):
        torch.manual_seed(seed)
        # Generators differ between device types, so a journal from another type cannot be resumed.
        kind, _, state = (journal.state or "").partition(":") if journal else ("", "", "")
        if journal is not None and kind == model.device.type:
            known = journal.up_to_state()
            if set(known) != {str(i) for i in range(len(known))}:  # the generator's state no longer fits
                raise InputError(f"{journal.file}: some completions are missing; delete the file to sample again")
            tensor = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
            torch.cuda.set_rng_state(tensor, model.device) if cuda else torch.set_rng_state(tensor)
        elif journal is not None:
            journal.clear()
        for indices in _batches(encoded, batch_size, description):
            if str(indices[0]) in known:
                continue
            prompt_ids = [encoded[i] for i in indices]
            batch, _ = _generate(model, tokenizer, prompt_ids, max_new_tokens, warpers, record_logps)
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


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end a completion, ascending: those of the chat template and of the model."""
    declared = model.generation_config.eos_token_id
    return sorted({*chat_turns(tokenizer).ends, *([declared] if isinstance(declared, int) else declared or [])})


class _TopTwoGap(LogitsProcessor):
    """Records for each sequence the smallest gap between its two largest logits in all steps before its end."""

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
            ended = torch.isin(input_ids[:, self.prompt_length :], self.eos_ids).any(dim=1)
            self.smallest = torch.where(ended, self.smallest, torch.minimum(self.smallest, gap))
        return scores


class _KeepLogits(LogitsProcessor):
    """Keeps the logits of the current step, shape (B, V), for `_ChosenLogps`."""

    logits: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        return scores


class _ChosenLogps(StoppingCriteria):
    """Records the log-probability of each sampled token, nats, under the logits that each of `kept` holds.

    A logits processor is called before a token is sampled; a stopping criterion is called after. This one stops
    nothing. The logits of all steps together, as `generate` can return them, would not fit in memory.
    """

    def __init__(self, *kept: _KeepLogits) -> None:
        self.kept = kept
        self.steps: list[torch.Tensor] = []  # one a step, shape (len(kept), B)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        chosen = input_ids[:, -1:]
        logps = [each.logits.log_softmax(dim=-1).gather(-1, chosen).squeeze(-1) for each in self.kept]
        self.steps.append(torch.stack(logps))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    max_new_tokens: int,
    warpers: Sequence[LogitsProcessor] | None = None,
    record_logps: bool = False,
) -> tuple[list[Completion], list[float]]:
    """Generates one left-padded batch; returns completions and each one's smallest gap between the top two logits.

    Decoding is greedy if `warpers` is None; otherwise tokens are sampled from the logits that the warpers return.
    """
    pad_id = tokenizer.pad_token_id
    width = max(len(ids) for ids in encoded)
    input_ids = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded])
    eos_ids = end_ids(model, tokenizer)
    gaps = _TopTwoGap(width, torch.tensor(eos_ids, device=model.device))
    processors: list[LogitsProcessor] = [gaps, *(warpers or ())]
    recorder = None
    if record_logps:
        processors.insert(1, raw := _KeepLogits())
        recorder = _ChosenLogps(raw)
        if warpers:
            processors.append(sampled := _KeepLogits())
            recorder = _ChosenLogps(raw, sampled)
    # Otherwise `generate` would fill unset options from the model's own settings, such as penalties and top-k.
    own, model.generation_config = model.generation_config, GenerationConfig()
    training = model.training
    model.eval()
    try:
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                do_sample=warpers is not None,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
                eos_token_id=eos_ids,
                **({} if warpers is None else {"top_k": 0}),
            ),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([recorder] if recorder else []),
        )
    finally:
        model.generation_config = own
        model.train(training)
    # Shape (1 or 2, B, steps): raw, and after the warpers, if there are any.
    logps: list[Any] = torch.stack(recorder.steps, dim=-1).tolist() if recorder else []
    completions = []
    for row, ids in enumerate(output[:, width:].tolist()):
        end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
        ids = ids if end is None else ids[: end + 1]
        # Special tokens inside, such as reasoning tags, are kept; only the end token is not part of the text.
        text = decode(tokenizer, ids if end is None else ids[:end])
        own_logps = [tuple(each[row][: len(ids)]) for each in logps]
        completions.append(
            Completion(
                text,
                len(ids),
                end is not None,
                ids=tuple(ids),
                sampler_logps=own_logps[-1] if own_logps else None,
                sampler_raw_logps=own_logps[0] if own_logps else None,
            )
        )
    assert gaps.smallest is not None
    return completions, gaps.smallest.tolist()
