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
from losslens.models.loading import ModelSource, load_model
from losslens.models.trained_weights import with_weights
from losslens.sampling.server import Decoding, Request
from losslens.sampling.vllm import BASE_NAME, VllmServer, neutral_fields

_PROMPTS, _TOKENS = 8, 32  # prompts that are answered for the proof, and tokens of each answer
# Mean difference in nats that is taken for rounding: at least the first; or the base's own, times the second.
_ROUNDING, _TIMES = 1e-3, 3.0


def require_weights_in_use(
    server: VllmServer, source: ModelSource, name: str, run: str, folder: Path, prompts: Sequence[tuple[int, ...]]
) -> dict[str, float]:
    """Compares the server's log-probabilities of its own greedy tokens with those of the local model.

    Args:
        server: The server.
        source: The base.
        name: The server's name for the weights.
        run: Their run, for messages.
        folder: Their folder.
        prompts: Token ids of held-out prompts, of which the first few are used.

    Returns:
        Numbers for the metadata: `tokens`, and mean absolute differences in nats between the server and the local
        model with the weights (`weights`), the server and the local base (`base`), and the two bases (`rounding`, if
        the server serves the base, too).

    Raises:
        InputError: The server's log-probabilities are not those of the weights, or may just as well be the base's.
        ServerError: The server does not answer.
    """
    chosen = tuple(prompts[:_PROMPTS])
    rounding = _rounding(server, source, chosen) if server.needs.weights is None else None
    answers = _greedy(server, name, source, chosen)
    served = _served_logps(answers)
    with_them, without = (_difference(source, where, answers, served) for where in (folder, None))
    found = {"tokens": float(len(served)), "weights": with_them, "base": without}
    found |= {} if rounding is None else {"rounding": rounding}
    limit = max(_ROUNDING, _TIMES * (rounding or 0.0))
    told = f"{run}: on {len(served)} tokens, vLLM's log-probabilities differ from those of the run's weights by"
    told += f" {with_them:.2g} nats and from the base's by {without:.2g}"
    if with_them > limit:
        raise InputError(f"{told}: it does not answer with these weights; nothing is scored (log: {server.log})")
    if without < 2 * with_them:
        remedy = "evaluation.engine=transformers scores it"
        raise InputError(f"{told}: rounding hides whether it answers with these weights; {remedy}")
    return found


@lru_cache(maxsize=4)
def _rounding(server: VllmServer, source: ModelSource, prompts: tuple[tuple[int, ...], ...]) -> float:
    """Returns the mean difference between the server's base and the local one; once for all runs."""
    answers = _greedy(server, BASE_NAME, source, prompts)
    return _difference(source, None, answers, _served_logps(answers))


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


def _difference(
    source: ModelSource,
    folder: Path | None,
    answers: Sequence[tuple[tuple[int, ...], Completion]],
    served: np.ndarray,
) -> float:
    """Returns the mean absolute difference in nats between the served log-probabilities and the local model's."""
    import torch

    base = load_model(source).model
    local = []
    with nullcontext(base) if folder is None else with_weights(base, folder) as model, torch.inference_mode():
        for prompt, completion in answers:
            ids = torch.tensor([[*prompt, *(completion.ids or ())]], device=base.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            local.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu().numpy())
    return float(np.abs(np.concatenate(local) - served).mean())
