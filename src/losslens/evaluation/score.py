"""Scoring of runs and the base model on benchmarks, each once, with the outcome of every problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig
from pydantic import ValidationError
from rich.console import Console

from losslens.config.data import Data
from losslens.config.evaluation import EvaluateConfig, Evaluation
from losslens.config.model import Model
from losslens.config.parse import parse
from losslens.core import provenance
from losslens.core.completions import Journal, report_truncation
from losslens.core.errors import InputError, ServerError, ServerStartError
from losslens.core.files import write_json
from losslens.core.hashing import hash_json
from losslens.core.notices import print_once
from losslens.core.terminal import Table
from losslens.evaluation.generate import EvalRequest, answer_locally, answer_via_server, answer_via_vllm
from losslens.evaluation.outcomes import (
    is_scored,
    model_fingerprint,
    outcomes_of,
    read_outcomes,
    task_fingerprint,
    write_outcomes,
)
from losslens.evaluation.statistics import wilson_interval
from losslens.models.trained_weights import weights_fingerprint
from losslens.problems import Problem
from losslens.problems.questions import templates_of
from losslens.rollouts.sample import held_out_problems, problem_source
from losslens.runs.integrity import matches_recorded_hash, record_outcomes, require_own_manifest
from losslens.runs.prompts import questions_trained_on
from losslens.runs.recorded import Trust, model_of
from losslens.runs.run import LockedError, Run, base_identity, base_run, runs_of
from losslens.sampling.vllm import is_batch_invariant

if TYPE_CHECKING:
    import pandas as pd

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


class SweepScores:
    """Scores of the completed runs of a sweep, and of their bases, on the benchmarks of `evaluate.py`.

    Args:
        config: The configuration of `evaluate.py`.

    Raises:
        InputError: The configuration is invalid, or the sweep has no completed run.
    """

    def __init__(self, config: DictConfig | dict[str, Any]) -> None:
        settings = parse(EvaluateConfig, config)
        runs = [run for run in runs_of(settings.output_dir, settings.sweep) if run.status["state"] == "completed"]
        if not runs:
            raise InputError(f"sweep={settings.sweep} has no completed run")
        self._benchmarks = list(settings.benchmark.values())
        self._evaluation = _with_max_tokens(runs, settings)
        self._trust = Trust(settings.trust_remote_code)
        self._bases = _unscored_bases(runs, self._trust)
        self.runs = [*self._bases, *runs]
        counts = sample_counts(self._evaluation)
        self.names = [benchmark_name(data, samples) for data in self._benchmarks for samples in counts]

    def score(self, run: Run, wait: bool) -> dict[str, Path]:
        """Returns the files of a run's outcomes by `benchmark_name`; scores it on what it was not scored on before.

        Args:
            run: One of `runs`.
            wait: If another process has locked the run, waits for it instead of raising an error.

        Raises:
            LockedError: Another process has locked the run, and `wait` is False.
            InputError: The run, its base or the problems cannot be loaded.
            ServerError: The server does not answer.
        """
        if run in self._bases:
            return score_base(run.folder.parent, self._bases[run], self._benchmarks, self._evaluation, wait)
        return _score_again(run, self._benchmarks, self._evaluation, self._trust, wait)


def evaluate_job(config: DictConfig, failed: Mapping[str, InputError | ServerError] | None = None) -> None:
    """Runs the job of `evaluate.py`: scores all completed runs of a sweep, and the base, on the benchmarks.

    Args:
        config: The configuration.
        failed: Errors of runs whose scoring has failed already, by name; it is not tried again.
    """
    sweep = SweepScores(config)
    tables = {name: Table("run", "accuracy", "95% interval") for name in sweep.names}
    errors = list((failed or {}).values())
    scores: dict[Run, dict[str, pd.DataFrame]] = {}
    queue = [(run, False) for run in sweep.runs if run.name not in (failed or {})]
    for run, wait in queue:
        try:
            files = sweep.score(run, wait)
            scores[run] = {name: read_outcomes(files[name]) for name in sweep.names}
        except LockedError as error:
            print(f"{error}; postponed", flush=True)
            queue.append((run, True))  # wait for it after the others
        except ServerStartError:
            raise  # as it would be for every other run
        except (InputError, ServerError) as error:
            errors.append(error)
    for run in [run for run in sweep.runs if run in scores]:
        for name, table in tables.items():
            outcomes = scores[run][name]
            problems = outcomes["problem_id"].nunique()
            low, high = wilson_interval(float(outcomes["correct"].mean()) * problems, problems)
            table.title = f"{name} (n = {problems})"
            table.add_row(run.name, f"{outcomes['correct'].mean():.1%}", f"{low:.1%} – {high:.1%}")
    for table in tables.values():
        if table.row_count:
            Console().print(table)
    if errors:
        kind = ServerError if any(isinstance(error, ServerError) for error in errors) else InputError
        raise kind("; ".join(dict.fromkeys(str(error) for error in errors)))


def _with_max_tokens(runs: Sequence[Run], config: EvaluateConfig) -> Evaluation:
    """Returns the evaluation settings, with `max_tokens` of the evaluation after training if it is not set.

    Raises:
        InputError: The runs record no such limit, or different ones.
    """
    evaluation = config.evaluation
    if evaluation.max_tokens is None:
        limits = {_max_tokens_of(run) for run in runs} - {None}
        if len(limits) != 1:
            for run in runs if not limits else ():
                run.manifest  # noqa: B018  # a damaged one is refused by its name
            recorded = f"different values ({', '.join(sorted(map(str, limits)))})" if limits else "no value"
            raise InputError(f"evaluation.max_tokens must be set: the runs of sweep={config.sweep} recorded {recorded}")
        evaluation = evaluation.model_copy(update={"max_tokens": limits.pop()})
    return Evaluation.model_validate(evaluation.model_dump())


def _max_tokens_of(run: Run) -> int | None:
    """Returns `max_tokens` of a run's evaluation after training; None for the base, or if the manifest is damaged."""
    try:
        limit = run.manifest["config"]["evaluation"]["max_tokens"]
    except (InputError, KeyError, TypeError):
        return None
    return limit if isinstance(limit, int) else None


def _unscored_bases(runs: Sequence[Run], trust: Trust) -> dict[Run, Model]:
    """Returns the bases of these runs, from their manifests, that are not among the runs themselves."""
    bases: dict[Run, Model] = {}
    known = {run.name.rpartition("-")[2] for run in runs if run.name.startswith("base-")}
    for run in runs:
        try:
            model = _base_of(run, trust)
        except InputError:
            continue  # reported when the run itself is scored
        base = base_run(run.folder.parent, model)
        identity = base.name.rpartition("-")[2]
        if identity not in known:
            bases[base] = model
            known.add(identity)
    return bases


def _score_again(
    run: Run, benchmarks: Sequence[Data], evaluation: Evaluation, trust: Trust, wait: bool
) -> dict[str, Path]:
    model = _base_of(run, trust)
    if run.manifest.get("method") == "base":
        return score_base(run.folder.parent, model, benchmarks, evaluation, wait)
    with run.lock(wait):
        if not run.is_trained():
            raise InputError(f"{run.folder}: contains no trained adapter")
        return score_run(run, model, benchmarks, evaluation)


def _base_of(run: Run, trust: Trust) -> Model:
    """Returns the base model of a run, from its manifest.

    Raises:
        InputError: The manifest is damaged or belongs to another run, or the base has changed.
    """
    manifest = run.manifest
    require_own_manifest(run.folder, manifest)
    try:
        model = model_of(manifest["config"]["model"], trust)
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(f"{run.folder / 'manifest.json'}: not a run of this version of LossLens") from error
    trained_on = manifest.get("base")
    if isinstance(trained_on, dict) and trained_on.get("hub_id"):
        # A branch may have moved since then.
        model = model.model_copy(update={"revision": trained_on.get("revision")})
    if base_identity(model) != trained_on:
        raise InputError(f"{run.folder}: model.path={model.path} is not the base that the run was trained on")
    return model
