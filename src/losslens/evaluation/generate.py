"""Generation of answers to problems, by the base or an adapter in this process, or by a server."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslens.config.evaluation import Evaluation
from losslens.config.model import Model
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.models.loading import load_model, source_of
from losslens.models.trained_weights import with_weights
from losslens.problems import Problem


@dataclass(frozen=True)
class EvalRequest:
    """Problems to answer, and the decoding parameters.

    Attributes:
        problems: The problems.
        samples: Number of sampled answers per problem; 0: one greedy answer.
        model: The base model.
        evaluation: Token limit and sampling parameters.
        journal: Stores answers as they arrive; answers already in it are reused.
        description: Label of the progress bar.
    """

    problems: Sequence[Problem]
    samples: int
    model: Model
    evaluation: Evaluation
    journal: Journal
    description: str


def answer_locally(request: EvalRequest, adapter: Path | None) -> list[list[Completion]]:
    """Generates answers of the base, with the trained weights in a folder unless that is None; restores the base."""
    from losslens.models.limits import limits_of
    from losslens.sampling.local import generate_greedy, generate_samples

    evaluation = request.evaluation
    prompts = [problem.prompt for problem in request.problems]
    limits_of(source_of(request.model)).require_prompts(prompts, evaluation.max_tokens, "evaluation.max_tokens")
    base = load_model(source_of(request.model))
    options: dict[str, Any] = {
        "max_new_tokens": evaluation.max_tokens,
        "batch_size": evaluation.batch_size,
        "description": request.description,
        "journal": request.journal,
    }
    with nullcontext(base.model) if adapter is None else with_weights(base.model, adapter) as model:
        if not request.samples:
            return [[completion] for completion in generate_greedy(model, base.tokenizer, prompts, **options)]
        return generate_samples(
            model,
            base.tokenizer,
            prompts,
            samples=request.samples,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            seed=evaluation.seed,
            **options,
        )


def _decode(request: EvalRequest, completions: list[Completion], per_problem: int) -> list[Completion]:
    """Decodes a server's answers from their token ids, including special tokens, if it returned any."""
    if not any(completion.ids for completion in completions):
        return completions
    from losslens.models.loading import load_tokenizer
    from losslens.models.tokens import read_server_completion

    tokenizer = load_tokenizer(source_of(request.model))
    prompts = [problem.prompt for problem in request.problems for _ in range(per_problem)]
    return [read_server_completion(tokenizer, prompt, c) for prompt, c in zip(prompts, completions, strict=True)]


def answer_via_server(request: EvalRequest, run: str | None) -> list[list[Completion]]:
    """Requests answers from a server with the base as `evaluation.server.model` and each adapter under its run's name.

    Args:
        request: The problems and decoding parameters.
        run: The run's name; None for the base.

    Raises:
        InputError: `evaluation.server.model` is not set.
        ServerError: The server does not answer; answers received so far are in the journal.
    """
    from losslens.sampling.server import Decoding, Request, ask

    evaluation, server, samples = request.evaluation, request.evaluation.server, request.samples
    name = run or server.model
    if not name:
        raise InputError("evaluation.server.model is required: the server's name for the base")
    per_problem = max(samples, 1)
    requests = {
        str(number): Request(
            request.problems[number // per_problem].prompt, evaluation.seed + number if samples else None
        )
        for number in range(per_problem * len(request.problems))
    }
    chat = {"chat_template_kwargs": request.model.chat_options} if request.model.chat_options else {}
    temperature, top_p = (evaluation.temperature, evaluation.top_p) if samples else (0.0, 1.0)
    known = request.journal.completions
    ask(
        "evaluation.server", server, name,
        {number: request for number, request in requests.items() if number not in known},
        Decoding(temperature, top_p, evaluation.max_tokens, {**chat, **(server.extra_body or {})}),
        lambda number, completion: request.journal.add({number: completion}), request.description,
    )  # fmt: skip
    completions = _decode(request, [known[number] for number in requests], per_problem)
    return [completions[i : i + per_problem] for i in range(0, len(completions), per_problem)]
