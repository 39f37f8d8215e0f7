"""Generation of answers to problems, by the base or an adapter in this process, or by a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from losslens.config.evaluation import Evaluation
from losslens.config.model import Model
from losslens.core.completions import Completion, Journal
from losslens.core.errors import InputError
from losslens.models.loading import load_model, load_tokenizer, source_of
from losslens.models.trained_weights import lora_rank, with_weights
from losslens.problems import Problem
from losslens.runs.run import Run, runs_of


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
    name = run or request.evaluation.server.model
    if not name:
        raise InputError("evaluation.server.model is required: the server's name for the base")
    from losslens.sampling.server import ask

    chat = {"chat_template_kwargs": request.model.chat_options} if request.model.chat_options else {}
    return _ask(request, partial(ask, "evaluation.server", request.evaluation.server, name), chat)


def answer_via_vllm(
    request: EvalRequest, run: Run, adapter: Path | None
) -> tuple[list[list[Completion]], dict[str, Any]]:
    """Starts a vLLM server unless one runs that serves the model, and asks it once the weights are shown to be in use.

    Args:
        request: The problems and decoding parameters.
        run: The run, under whose name its adapter is served; or that of the base.
        adapter: Folder of the trained weights; None for the base.

    Returns:
        The answers, and facts about the server for the metadata of the outcomes.

    Raises:
        InputError: vLLM is not there, cannot serve the weights, or answers without them.
        ServerError: The server does not start or answer; answers received so far are in the journal.
    """
    from losslens.evaluation.served_weights import require_weights_in_use
    from losslens.models.limits import limits_of
    from losslens.models.tokens import encode_prompt
    from losslens.sampling.vllm import BASE_NAME, Needs, neutral_fields, vllm_server

    source, evaluation = source_of(request.model), request.evaluation
    prompts = [problem.prompt for problem in request.problems]
    limits_of(source).require_prompts(prompts, evaluation.max_tokens, "evaluation.max_tokens")
    load_model(source)  # for the proof; before the server, which takes what memory it finds
    tokenizer = load_tokenizer(source)
    ids = {prompt: tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts}
    tokens = max(map(len, ids.values())) + evaluation.max_tokens
    # Trained as a whole, it is a model of its own, read with the base's tokenizer.
    whole = adapter if adapter is not None and lora_rank(adapter) is None else None
    rank = _largest_rank(run.folder.parent) if whole is None else 0
    needs = Needs(source, tokens, rank, whole)
    server = vllm_server("evaluation.server", evaluation.server, needs, run.folder.parents[1] / ".vllm")
    name, facts = BASE_NAME, dict(server.facts)
    if adapter is not None:
        if whole is None:
            name = run.name
            server.load_adapter(name, adapter)
        facts["agreement"] = require_weights_in_use(server, source, name, run.name, adapter, list(ids.values()))
    return _ask(request, partial(server.ask, name), neutral_fields(source), ids), facts


def _largest_rank(sweep: Path) -> int:
    """Returns the largest rank of a sweep's adapters, so that one server serves them all, and the base."""
    ranks = [0]
    for run in runs_of(sweep.parent, sweep.name):
        if run.adapter.is_dir():
            with suppress(InputError):  # reported when the run itself is scored
                ranks.append(lora_rank(run.adapter) or 0)
    return max(ranks)


def _ask(
    request: EvalRequest,
    send: Callable[..., None],
    fields: Mapping[str, Any],
    ids: Mapping[str, tuple[int, ...]] | None = None,
) -> list[list[Completion]]:
    """Requests the answers that are not in the journal.

    Args:
        request: The problems and decoding parameters.
        send: Sends requests, as `server.ask` does after its first three arguments.
        fields: Further fields of each request, which those of the configuration replace.
        ids: Token ids of each prompt, if they are sent instead of it.
    """
    from losslens.sampling.server import Decoding, Request

    evaluation, samples = request.evaluation, request.samples
    per_problem = max(samples, 1)
    requests = {}
    for number in range(per_problem * len(request.problems)):
        prompt = request.problems[number // per_problem].prompt
        seed = evaluation.seed + number if samples else None
        requests[str(number)] = Request(prompt, seed, None if ids is None else ids[prompt])
    temperature, top_p = (evaluation.temperature, evaluation.top_p) if samples else (0.0, 1.0)
    known = request.journal.completions
    extra_body = {**fields, **(evaluation.server.extra_body or {})}
    send(
        {number: asked for number, asked in requests.items() if number not in known},
        Decoding(temperature, top_p, evaluation.max_tokens, extra_body),
        lambda number, completion: request.journal.add({number: completion}),
        request.description,
    )
    completions = _decode(request, [known[number] for number in requests], per_problem)
    return [completions[i : i + per_problem] for i in range(0, len(completions), per_problem)]
