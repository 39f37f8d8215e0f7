"""Scoring of runs and the base model on benchmarks, each once, with the outcome of every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from losslens.config.data import Data
from losslens.config.evaluation import Evaluation
from losslens.config.model import Model
from losslens.core import provenance
from losslens.core.completions import Journal, report_truncation
from losslens.core.errors import InputError
from losslens.core.files import write_json
from losslens.core.hashing import hash_json
from losslens.core.notices import print_once
from losslens.evaluation.generate import EvalRequest, answer_locally, answer_via_server, answer_via_vllm
from losslens.evaluation.outcomes import (
    is_scored,
    model_fingerprint,
    outcomes_of,
    task_fingerprint,
    write_outcomes,
)
from losslens.models.trained_weights import weights_fingerprint
from losslens.problems import Problem
from losslens.problems.questions import templates_of
from losslens.rollouts.sample import held_out_problems, problem_source
from losslens.runs.integrity import matches_recorded_hash, record_outcomes, require_own_manifest
from losslens.runs.prompts import questions_trained_on
from losslens.runs.run import Run, base_identity, base_run
from losslens.sampling.vllm import is_batch_invariant

if TYPE_CHECKING:
    pass

# Incremented when decoding the same token ids gives a different text; 2 keeps special tokens in answers.
_DECODING_VERSION = 2


def score_run(run: Run, model: Model, benchmarks: Sequence[Data], evaluation: Evaluation) -> dict[str, Path]:
    """Scores a trained run on the held-out problems of each benchmark, unless that was done before.

    Returns:
        The files of outcomes, by `benchmark_name`.

    Raises:
        InputError: The model or the problems cannot be loaded.
        ServerError: The server does not answer; answers received so far are kept.
    """
    return {
        benchmark_name(data, samples): _score(run, run.adapter, model, data, evaluation, samples)
        for data in benchmarks
        for samples in sample_counts(evaluation)
    }


def score_base(
    sweep: Path, model: Model, benchmarks: Sequence[Data], evaluation: Evaluation, wait: bool = True
) -> dict[str, Path]:
    """Scores the base model in a sweep's folder, unless that was done before.

    Args:
        sweep: The sweep's folder.
        model: The base model.
        benchmarks: Benchmarks to score on.
        evaluation: Decoding parameters.
        wait: If the base is locked by another process, waits for it instead of raising an error.

    Returns:
        As for `score_run`.

    Raises:
        LockedError: The base is locked by another process, and `wait` is False.
    """
    if not benchmarks:
        return {}
    run = base_run(sweep, model)
    with run.lock(wait):
        _write_base_manifest(run, model)
        files = {
            benchmark_name(data, samples): _score(run, None, model, data, evaluation, samples)
            for data in benchmarks
            for samples in sample_counts(evaluation)
        }
        if run.status.get("state") != "completed":
            run.set_state("completed")
    return files


def _write_base_manifest(run: Run, model: Model) -> None:
    """Writes the manifest of a base's run, unless it has one."""
    try:
        require_own_manifest(run.folder, run.manifest)
    except InputError:
        manifest = {
            "run": run.name, "method": "base", "base": base_identity(model),
            "config": {"model": model.model_dump(mode="json")}, "outcomes": {}, **provenance.describe_environment(),
        }  # fmt: skip
        write_json(run.folder / "manifest.json", manifest, sealed=True)


def require_problems(benchmarks: Sequence[Data]) -> None:
    """Checks before training that the problems of all benchmarks can be loaded.

    Raises:
        InputError: As for `held_out_problems`.
    """
    for data in benchmarks:
        held_out_problems(data)


def sample_counts(evaluation: Evaluation) -> list[int]:
    """Returns the numbers of samples per problem to evaluate with: 0 for greedy (pass@1), and k for avg@k."""
    return [0, evaluation.samples_per_prompt] if evaluation.samples_per_prompt else [0]


def benchmark_name(data: Data, samples: int) -> str:
    """Returns the name of a benchmark's outcomes: `gsm8k` for pass@1, `gsm8k-avg8` for avg@8."""
    return f"{data.name}-avg{samples}" if samples else data.name


def _score(run: Run, adapter: Path | None, model: Model, data: Data, evaluation: Evaluation, samples: int) -> Path:
    name = benchmark_name(data, samples)
    source = problem_source(data)
    further: dict[str, Any] = {"offset": data.eval_offset} if data.eval_offset else {}
    further |= data.verification
    task = {"source": source.identity("eval"), "eval": data.eval_size, **further, "seed": data.seed}
    asked = hash_json([task, _decoding(model, evaluation, samples)], 16)
    scored = model_fingerprint(base_identity(model), None if adapter is None else weights_fingerprint(adapter))
    file = _outcomes_file(run, name, asked)
    partial = file.parent / f".{name}-{asked}-{scored}.partial.jsonl"
    if is_scored(file, asked, scored):
        intact = matches_recorded_hash(run.folder, file)
        if intact is None:  # from before hashes were recorded
            record_outcomes(run.folder, file)
        if intact is not False:
            partial.unlink(missing_ok=True)  # of a process that was killed when it had written the outcomes
            return file
    if file.exists():
        print(f"{file}: damaged or outdated; scoring again", flush=True)
    problems = held_out_problems(data)
    description = f"{run.name} on {name}"
    if adapter is not None:
        _report_contamination(run, problems, source.identity("eval"), description)
    journal = Journal(partial)
    try:
        request = EvalRequest(problems, samples, model, evaluation, journal, description)
        facts: dict[str, Any] = {}
        if evaluation.engine == "vllm":
            completions, facts = answer_via_vllm(request, run, adapter)
        elif evaluation.engine == "openai":
            completions = answer_via_server(request, None if adapter is None else run.name)
        else:
            completions = answer_locally(request, adapter)
        answers = [answer for group in completions for answer in group]
        report_truncation(answers, description, "evaluation.max_tokens", evaluation.max_tokens)
        outcomes = outcomes_of(source.verifier, problems, completions, data.verify_seconds)
        write_outcomes(outcomes, file, asked, scored, facts)
        record_outcomes(run.folder, file)
    finally:
        journal.close()
    journal.done()
    return file


def _outcomes_file(run: Run, benchmark: str, asked: str) -> Path:
    """Returns the file for outcomes; if the benchmark's plain name is taken by another task, a name with its hash."""
    plain = run.evaluation(benchmark)
    try:
        taken = (
            plain.exists()
            and task_fingerprint(plain) != asked
            and matches_recorded_hash(run.folder, plain) is not False
        )
    except InputError:  # damaged, will be overwritten
        taken = False
    return run.evaluation(f"{benchmark}-{asked[:8]}") if taken else plain


def _report_contamination(run: Run, problems: Sequence[Problem], identity: Mapping[str, Any], description: str) -> None:
    """Prints how many of the problems are prompts that the run was trained on, or why that is not known."""
    try:
        trained_on = questions_trained_on(run)
    except InputError as error:  # scoring does not need them
        print_once(f"{error}; cannot check if {run.name} was trained on the prompts it is scored on")
        return
    templates = templates_of({"source": identity})
    count = sum(trained_on.has(problem.prompt, templates, problem.id) for problem in problems)
    if count:
        print(f"{description}: trained on the prompts of {count} of {len(problems)} problems", flush=True)


def _decoding(model: Model, evaluation: Evaluation, samples: int) -> list[Any]:
    """Returns the settings that determine the answers of a given model, for the fingerprint of the task."""
    sampling = [samples, evaluation.temperature, evaluation.top_p, evaluation.seed] if samples else []
    if evaluation.engine == "openai":
        server = evaluation.server
        return [
            "openai",
            _DECODING_VERSION,
            server.token_ids,
            server.model,
            evaluation.max_tokens,
            *sampling,
            server.extra_body,
            model.chat_options,
        ]
    if evaluation.engine == "vllm":
        server = evaluation.server
        settings = [evaluation.max_tokens, *sampling, server.args, server.extra_body, model.dtype, model.chat_options]
        return ["vllm", _DECODING_VERSION, *settings, is_batch_invariant()]
    decoding = [_DECODING_VERSION, evaluation.max_tokens, model.dtype, model.chat_options, *sampling]
    if samples or model.dtype in ("bfloat16", "float16"):  # the batch size may affect answers
        decoding.append(evaluation.batch_size)
    return decoding
