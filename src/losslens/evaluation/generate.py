"""Answers to problems: of the base or an adapter in this process, or of a server that serves them."""

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
from losslens.models.adapters import with_adapter
from losslens.models.loading import load_model, source_of
from losslens.problems import Problem


@dataclass(frozen=True)
class EvalRequest:
    """Problems, and how they are to be answered.

    Attributes:
        problems: The problems.
        samples: Sampled answers to each; 0: one greedy answer.
        model: The base.
        evaluation: Token limit and sampling.
        journal: Keeps the answers as they arrive; what is in it is not asked again.
        description: Of the progress bar.
    """

    problems: Sequence[Problem]
    samples: int
    model: Model
    evaluation: Evaluation
    journal: Journal
    description: str


def answer_locally(questions: EvalRequest, adapter: Path | None) -> list[list[Completion]]:
    """The answers of the base with the adapter in a folder on it; the base is as it was afterwards."""
    from losslens.models.limits import limits_of
    from losslens.sampling.local import generate_greedy, generate_samples

    evaluation = questions.evaluation
    prompts = [problem.prompt for problem in questions.problems]
    limits_of(source_of(questions.model)).require_prompts(prompts, evaluation.max_tokens, "evaluation.max_tokens")
    base = load_model(source_of(questions.model))
    options: dict[str, Any] = {
        "max_new_tokens": evaluation.max_tokens,
        "batch_size": evaluation.batch_size,
        "description": questions.description,
        "journal": questions.journal,
    }
    with nullcontext(base.model) if adapter is None else with_adapter(base.model, adapter) as model:
        if not questions.samples:
            return [[completion] for completion in generate_greedy(model, base.tokenizer, prompts, **options)]
        return generate_samples(
            model,
            base.tokenizer,
            prompts,
            samples=questions.samples,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            seed=evaluation.seed,
            **options,
        )


def _read(questions: EvalRequest, completions: list[Completion], each: int) -> list[Completion]:
    """A server's answers with the text of their token ids, special tokens included, where it gave any."""
    if not any(completion.ids for completion in completions):
        return completions
    from losslens.models.loading import load_tokenizer
    from losslens.models.tokens import read_server_completion

    tokenizer = load_tokenizer(source_of(questions.model))
    prompts = [problem.prompt for problem in questions.problems for _ in range(each)]
    return [read_server_completion(tokenizer, prompt, c) for prompt, c in zip(prompts, completions, strict=True)]


def answer_via_server(questions: EvalRequest, run: str | None) -> list[list[Completion]]:
    """The answers of a server that serves the base as `evaluation.server.model` and each adapter by its run's name.

    Args:
        questions: What is asked.
        run: The run's name; None for the base.

    Raises:
        InputError: The base's name there is not given.
        ServerError: The server does not answer; what it answered is in the journal.
    """
    from losslens.sampling.server import Decoding, Request, ask

    evaluation, server, samples = questions.evaluation, questions.evaluation.server, questions.samples
    name = run or server.model
    if not name:
        raise InputError("evaluation.server.model: the name under which the server serves the base")
    each = max(samples, 1)
    requests = {
        str(number): Request(questions.problems[number // each].prompt, evaluation.seed + number if samples else None)
        for number in range(each * len(questions.problems))
    }
    chat = {"chat_template_kwargs": questions.model.chat_options} if questions.model.chat_options else {}
    temperature, top_p = (evaluation.temperature, evaluation.top_p) if samples else (0.0, 1.0)
    known = questions.journal.completions
    ask(
        "evaluation.server", server, name,
        {number: request for number, request in requests.items() if number not in known},
        Decoding(temperature, top_p, evaluation.max_tokens, {**chat, **(server.extra_body or {})}),
        lambda number, completion: questions.journal.add({number: completion}), questions.description,
    )  # fmt: skip
    completions = _read(questions, [known[number] for number in requests], each)
    return [completions[i : i + each] for i in range(0, len(completions), each)]
