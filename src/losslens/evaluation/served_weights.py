"""Proof that a server answers with the trained weights, before its answers are scored.

A server that ignores an adapter answers as the base does, and nothing in its answers says so: each run would be scored
as the base. So a few greedy tokens of the server are scored here as well, by the base and with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np

from losslens.core.completions import Completion
from losslens.core.errors import InputError
from losslens.models.loading import ModelSource, load_model, resolve_dtype
from losslens.models.trained_weights import with_weights
from losslens.sampling.server import Decoding, Request
from losslens.sampling.vllm import BASE_NAME, VllmServer, neutral_fields

_PROMPTS, _TOKENS = 16, 32  # prompts that are answered for the proof, and tokens of each answer
# Mean difference in nats that is taken for rounding: three times that seen on the base, and at least the first, at most
# the second. Of a whole model, whose server has no base, it is the precision's own.
_TIMES, _LEAST, _MOST = 3.0, 1e-6, 0.1
_OF_WHOLE = {"float32": 1e-5}


def require_weights_in_use(
    server: VllmServer, source: ModelSource, name: str, run: str, folder: Path, prompts: Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """Compares the server's log-probabilities s of its own greedy tokens with those of the local model.

    With the weights, the local model gives w, and the base b. The server must agree with w up to rounding, and the
    slope of s − b on w − b must be 1 and not 0, the base's: rounding that hides single tokens averages out in it.

    Args:
        server: The server.
        source: The base.
        name: The server's name for the weights.
        run: Their run, for messages.
        folder: Their folder.
        prompts: Token ids of held-out prompts, of which the first few are used.

    Returns:
        Numbers for the metadata: `tokens`; mean absolute differences in nats |s − w| (`weights`), |s − b| (`base`), and
        that between the two bases (`rounding`, if the server serves the base, too); `slope` and its `slope_error`.

    Raises:
        InputError: The server's log-probabilities are not those of the weights, or may just as well be the base's.
        ServerError: The server does not answer.
    """
    chosen = tuple(prompts[:_PROMPTS])
    rounding = _rounding(server, source, chosen) if server.needs.weights is None else None
    answers = _greedy(server, name, source, chosen)
    s, w, b = _served_logps(answers), _local_logps(source, folder, answers), _local_logps(source, None, answers)
    with_them, without = float(np.abs(s - w).mean()), float(np.abs(s - b).mean())
    moved = float(np.sqrt(np.sum((w - b) ** 2)))
    slope = float((s - b) @ (w - b)) / moved**2 if moved else float("nan")
    error = float(np.sqrt(np.mean((s - w) ** 2))) / moved if moved else float("nan")
    limit = _OF_WHOLE.get(resolve_dtype(source), _MOST) if rounding is None else max(_LEAST, _TIMES * rounding)
    told = f"{run}: on {len(s)} tokens, vLLM's log-probabilities differ from those of the run's weights by"
    told += f" {with_them:.2g} nats and from the base's by {without:.2g}"
    # Asked so that NaN passes none of them.
    if not with_them <= min(limit, _MOST):
        raise InputError(f"{told}: it does not answer with these weights; nothing is scored (log: {server.log})")
    if not slope - 3 * error > 0.5:
        remedy = "evaluation.engine=transformers scores it"
        raise InputError(f"{told}: rounding hides whether it answers with these weights; {remedy}")
    found = {"tokens": float(len(s)), "weights": with_them, "base": without, "slope": slope, "slope_error": error}
    return found | ({} if rounding is None else {"rounding": rounding})


@lru_cache(maxsize=4)
def _rounding(server: VllmServer, source: ModelSource, prompts: tuple[tuple[int, ...], ...]) -> float:
    """Returns the mean difference between the server's base and the local one; once for all runs."""
    answers = _greedy(server, BASE_NAME, source, prompts)
    return float(np.abs(_served_logps(answers) - _local_logps(source, None, answers)).mean())


def _greedy(
    server: VllmServer, name: str, source: ModelSource, prompts: Sequence[tuple[int, ...]]
) -> list[tuple[tuple[int, ...], Completion]]:
    """Asks for greedy answers; returns each prompt with its answer."""
    answers: dict[str, Completion] = {}
    requests = {str(number): Request("", None, ids) for number, ids in enumerate(prompts)}
    decoding = Decoding(0.0, 1.0, _TOKENS, neutral_fields(source), logps=True)
    server.ask(name, requests, decoding, answers.__setitem__, f"{name}: which weights?")
    return [(ids, answers[str(number)]) for number, ids in enumerate(prompts)]


def _served_logps(answers: Sequence[tuple[tuple[int, ...], Completion]]) -> np.ndarray:
    given = [completion.sampler_raw_logps for _, completion in answers]
    if any(logps is None for logps in given):
        raise InputError("vLLM returned no log-probabilities, so that its weights cannot be checked; nothing is scored")
    return np.concatenate([np.array(logps) for logps in given])


def _local_logps(
    source: ModelSource, folder: Path | None, answers: Sequence[tuple[tuple[int, ...], Completion]]
) -> np.ndarray:
    """Returns the log-probabilities of the answers' tokens under the local base, with the weights in `folder` if any.

    In nats, shape (tokens,), of all answers one after the other.
    """
    import torch

    base = load_model(source).model
    local = []
    with nullcontext(base) if folder is None else with_weights(base, folder) as model, torch.inference_mode():
        for prompt, completion in answers:
            ids = torch.tensor([[*prompt, *(completion.ids or ())]], device=base.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            local.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu().numpy())
    return np.concatenate(local)
