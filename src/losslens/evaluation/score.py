"""Scores runs and the base on benchmarks, each once, and keeps the outcome of every problem."""

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
from losslens.core.errors import InputError, ServerError
from losslens.core.files import write_json
from losslens.core.hashing import hash_json
from losslens.core.terminal import Table
from losslens.evaluation.generate import EvalRequest, answer_locally, answer_via_server
from losslens.evaluation.outcomes import (
    is_scored,
    model_fingerprint,
    outcomes_of,
    read_outcomes,
    task_fingerprint,
    write_outcomes,
)
from losslens.evaluation.statistics import wilson_interval
from losslens.models.adapters import adapter_fingerprint
from losslens.problems import Problem
from losslens.problems.questions import templates_of
from losslens.rollouts.frozen import asked_in, load_rollouts
from losslens.rollouts.sample import problem_source
from losslens.runs.integrity import are_recorded, record_outcomes, require_own_manifest
from losslens.runs.recorded import Trust, model_of
from losslens.runs.run import LockedError, Run, base_identity, base_run, runs_of

if TYPE_CHECKING:
    import pandas as pd

# Raised when the same answer begins to be read otherwise: 2 keeps the special tokens that stand in it.
_READING = 2


def score_run(run: Run, model: Model, benchmarks: Sequence[Data], evaluation: Evaluation) -> dict[str, Path]:
    """Scores a trained run on the held-out problems of each benchmark, unless that was done before.

    Returns:
        The file of outcomes by `benchmark_name`.

    Raises:
        InputError: The model cannot be loaded, or the problems cannot be had.
        ServerError: The server that serves the adapter does not answer; what it answered is kept.
    """
    return {
        benchmark_name(data, samples): _score(run, run.adapter, model, data, evaluation, samples)
        for data in benchmarks
        for samples in sample_counts(evaluation)
    }


def score_base(
    sweep: Path, model: Model, benchmarks: Sequence[Data], evaluation: Evaluation, wait: bool = True
) -> dict[str, Path]:
    """Scores the untrained base in the folder `sweep`, unless that was done before.

    Args:
        sweep: The folder.
        model: The base.
        benchmarks: What it is scored on.
        evaluation: How its answers are made.
        wait: Whether to wait while another process scores it.

    Returns:
        As `score_run`.

    Raises:
        HeldError: Another process scores it, and `wait` is false.
    """
    if not benchmarks:
        return {}
    run = base_run(sweep, model)
    with run.lock(wait):
        _write_down_base(run, model)
        files = {
            benchmark_name(data, samples): _score(run, None, model, data, evaluation, samples)
            for data in benchmarks
            for samples in sample_counts(evaluation)
        }
        if run.status.get("state") != "completed":
            run.set_state("completed")
    return files


def _write_down_base(run: Run, model: Model) -> None:
    """Writes the manifest of a base's run, unless it has its own."""
    try:
        require_own_manifest(run.folder, run.manifest)
    except InputError:
        manifest = {
            "run": run.name, "method": "base", "base": base_identity(model),
            "config": {"model": model.model_dump(mode="json")}, "outcomes": {}, **provenance.describe_environment(),
        }  # fmt: skip
        write_json(run.folder / "manifest.json", manifest)


def require_problems(benchmarks: Sequence[Data]) -> None:
    """Refuses benchmarks whose problems cannot be had, before hours of training rather than after.

    Raises:
        InputError: As for `ProblemSource.problems`.
    """
    for data in benchmarks:
        problem_source(data).problems("eval", data.eval_size, data.seed)


def sample_counts(evaluation: Evaluation) -> list[int]:
    """Samples of each way in which problems are answered: 0 is greedily (pass@1), k by k samples (avg@k)."""
    return [0, evaluation.samples_per_prompt] if evaluation.samples_per_prompt else [0]


def benchmark_name(data: Data, samples: int) -> str:
    """What the outcomes are called: `gsm8k` for pass@1, `gsm8k-avg8` for avg@8."""
    return f"{data.name}-avg{samples}" if samples else data.name


def _score(run: Run, adapter: Path | None, model: Model, data: Data, evaluation: Evaluation, samples: int) -> Path:
    name = benchmark_name(data, samples)
    source = problem_source(data)
    about = {"source": source.identity("eval"), "eval": data.eval_size, "seed": data.seed}
    asked = hash_json([about, _decoding(model, evaluation, samples)], 16)
    scored = model_fingerprint(base_identity(model), None if adapter is None else adapter_fingerprint(adapter))
    file = _outcomes_file(run, name, asked)
    if is_scored(file, asked, scored):
        intact = are_recorded(run.folder, file)
        if intact is None:  # from before hashes were kept
            record_outcomes(run.folder, file)
        if intact is not False:
            return file
    if file.exists():
        print(f"{file}: not the outcomes that were written; scoring again", flush=True)
    problems = source.problems("eval", data.eval_size, data.seed)
    description = f"{run.name} on {name}"
    _say_what_was_trained_on(run, problems, source.identity("eval"), description)
    journal = Journal(file.parent / f".{name}-{asked}-{scored}.partial.jsonl")
    try:
        questions = EvalRequest(problems, samples, model, evaluation, journal, description)
        if evaluation.engine == "openai":
            completions = answer_via_server(questions, None if adapter is None else run.name)
        else:
            completions = answer_locally(questions, adapter)
        answers = [answer for group in completions for answer in group]
        report_truncation(answers, description, "evaluation.max_tokens", evaluation.max_tokens)
        outcomes = outcomes_of(source.verifier, problems, completions, data.verify_seconds)
        write_outcomes(outcomes, file, asked, scored)
        record_outcomes(run.folder, file)
    finally:
        journal.close()
    journal.done()
    return file


def _outcomes_file(run: Run, benchmark: str, asked: str) -> Path:
    """Where outcomes go: what was asked in another way before stays, and keeps the benchmark's plain name."""
    plain = run.evaluation(benchmark)
    try:
        taken = plain.exists() and task_fingerprint(plain) != asked and are_recorded(run.folder, plain) is not False
    except InputError:  # damaged, and written anew
        taken = False
    return run.evaluation(f"{benchmark}-{asked[:8]}") if taken else plain


def _say_what_was_trained_on(
    run: Run, problems: Sequence[Problem], identity: Mapping[str, Any], description: str
) -> None:
    about = run.manifest.get("rollouts") if (run.folder / "manifest.json").exists() else None
    folder = about.get("folder") if isinstance(about, dict) else None
    rollouts = run.folder.parents[1] / "rollouts" / Path(str(folder)).name
    if folder is None or not rollouts.is_dir():
        return
    try:
        trained_on = asked_in(load_rollouts(rollouts))
    except InputError as error:  # scores do not need them
        print(f"{error}; whether its prompts are among the problems is not known", flush=True)
        return
    templates = templates_of({"source": identity})
    count = sum(trained_on.has(problem.prompt, templates, problem.id) for problem in problems)
    if count:
        print(f"{description}: {count} of {len(problems)} problems are prompts that it was trained on", flush=True)


def _decoding(model: Model, evaluation: Evaluation, samples: int) -> list[Any]:
    """What decides the answers of one and the same model."""
    sampling = [samples, evaluation.temperature, evaluation.top_p, evaluation.seed] if samples else []
    if evaluation.engine == "openai":
        server = evaluation.server
        return [
            "openai",
            _READING,
            server.token_ids,
            server.model,
            evaluation.max_tokens,
            *sampling,
            server.extra_body,
            model.chat_options,
        ]
    decoding = [_READING, evaluation.max_tokens, model.dtype, model.chat_options, *sampling]
    if samples or model.dtype in ("bfloat16", "float16"):  # where the batch may change an answer
        decoding.append(evaluation.batch_size)
    return decoding


def evaluate_job(config: DictConfig) -> None:
    """What `evaluate.py` does: scores every completed run of a sweep, and the base, on the benchmarks."""
    checked = parse(EvaluateConfig, config)
    runs = [run for run in runs_of(checked.output_dir, checked.sweep) if run.status["state"] == "completed"]
    if not runs:
        raise InputError(f"sweep={checked.sweep}: no run is completed")
    benchmarks = list(checked.benchmark.values())
    evaluation = _as_long_as_before(runs, checked)
    names = [benchmark_name(data, samples) for data in benchmarks for samples in sample_counts(evaluation)]
    tables = {name: Table("run", "accuracy", "95% interval") for name in names}
    refused = []
    scores: dict[Run, dict[str, pd.DataFrame]] = {}
    trust = Trust(checked.trust_remote_code)
    bases = _bases_never_scored(runs, trust)
    runs = [*bases, *runs]
    todo = [(run, False) for run in runs]
    for run, wait in todo:
        try:
            if run in bases:
                files = score_base(run.folder.parent, bases[run], benchmarks, evaluation, wait)
            else:
                files = _score_again(run, benchmarks, evaluation, trust, wait)
            scores[run] = {name: read_outcomes(files[name]) for name in names}
        except LockedError as error:
            print(f"{error}; left for later", flush=True)
            todo.append((run, True))  # after the others, and then it is waited for
        except (InputError, ServerError) as error:
            refused.append(error)
    for run in [run for run in runs if run in scores]:
        for name, table in tables.items():
            outcomes = scores[run][name]
            problems = outcomes["problem_id"].nunique()
            low, high = wilson_interval(float(outcomes["correct"].mean()) * problems, problems)
            table.title = f"{name} (n = {problems})"
            table.add_row(run.name, f"{outcomes['correct'].mean():.1%}", f"{low:.1%} – {high:.1%}")
    for table in tables.values():
        if table.row_count:
            Console().print(table)
    if refused:
        kind = ServerError if any(isinstance(error, ServerError) for error in refused) else InputError
        raise kind("; ".join(dict.fromkeys(str(error) for error in refused)))


def _as_long_as_before(runs: Sequence[Run], config: EvaluateConfig) -> Evaluation:
    """The evaluation that is asked for; without a length of its own, answers may be as long as after training.

    Raises:
        InputError: No run says how long that was, or several say otherwise.
    """
    evaluation = config.evaluation
    if evaluation.max_tokens is None:
        found = {_length_of(run) for run in runs} - {None}
        if len(found) != 1:
            said = f"its runs were scored with {', '.join(sorted(map(str, found)))}" if found else "no run of it says"
            raise InputError(
                f"evaluation.max_tokens: how long may an answer be? In sweep={config.sweep} {said}; set it"
            )
        evaluation = evaluation.model_copy(update={"max_tokens": found.pop()})
    return Evaluation.model_validate(evaluation.model_dump())


def _length_of(run: Run) -> int | None:
    """How long a run's answers might be after training; None of the base, and where the manifest is damaged."""
    try:
        length = run.manifest["config"]["evaluation"]["max_tokens"]
    except (InputError, KeyError, TypeError):
        return None
    return length if isinstance(length, int) else None


def _bases_never_scored(runs: Sequence[Run], trust: Trust) -> dict[Run, Model]:
    """The bases of these runs, as their manifests have them, that are not among them: no run scored them."""
    found: dict[Run, Model] = {}
    known = {run.name.rpartition("-")[2] for run in runs if run.name.startswith("base-")}
    for run in runs:
        try:
            model = _base_of(run, trust)
        except InputError:
            continue  # told when the run itself is scored
        base = base_run(run.folder.parent, model)
        identity = base.name.rpartition("-")[2]
        if identity not in known:
            found[base] = model
            known.add(identity)
    return found


def _score_again(
    run: Run, benchmarks: Sequence[Data], evaluation: Evaluation, trust: Trust, wait: bool
) -> dict[str, Path]:
    model = _base_of(run, trust)
    if run.manifest.get("method") == "base":
        return score_base(run.folder.parent, model, benchmarks, evaluation, wait)
    with run.lock(wait):
        if not run.is_trained():
            raise InputError(f"{run.folder}: no finished adapter in it")
        return score_run(run, model, benchmarks, evaluation)


def _base_of(run: Run, trust: Trust) -> Model:
    """The base of a run, as its manifest has it.

    Raises:
        InputError: The manifest is damaged or not of this run, or the base is no longer that.
    """
    manifest = run.manifest
    require_own_manifest(run.folder, manifest)
    try:
        model = model_of(manifest["config"]["model"], trust)
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(f"{run.folder / 'manifest.json'}: not a run of this version of LossLens") from error
    trained_on = manifest.get("base")
    if isinstance(trained_on, dict) and trained_on.get("hub_id"):
        # A branch may have moved since.
        model = model.model_copy(update={"revision": trained_on.get("revision")})
    if base_identity(model) != trained_on:
        raise InputError(f"{run.folder}: model.path={model.path} is not the base that it was trained on")
    return model
