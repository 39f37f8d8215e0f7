"""Scores runs and the base on a benchmark, each once, and keeps the outcome of every problem."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from losslens import provenance
from losslens.config import Data, EvaluateConfig, Evaluation, Model, build, parse
from losslens.errors import InputError
from losslens.evaluation import evaluate, is_scored, read_outcomes, scored_by, write_outcomes
from losslens.files import digest, write_json
from losslens.models import adapter_sha256, carrying, load_model
from losslens.runs import Run, base_identity, base_run, base_source, runs_of
from losslens.statistics import wilson_interval


def score_run(run: Run, model: Model, data: Data, evaluation: Evaluation) -> None:
    """Scores a trained run on the held-out problems of `data`, unless that was done before.

    Raises:
        InputError: The model cannot be loaded, or the problems cannot be had.
    """
    _score(run, run.adapter, model, data, evaluation)


def score_base(sweep: Path, model: Model, data: Data, evaluation: Evaluation) -> None:
    """Scores the untrained base in the folder `sweep`, unless that was done before.

    Raises:
        InputError: As for `score_run`.
    """
    run = base_run(sweep, model)
    with run.lock():
        _score(run, None, model, data, evaluation)
        if run.status.get("state") != "completed":
            manifest = {
                "run": run.name,
                "method": "base",
                "base": base_identity(model),
                "config": {"model": model.model_dump(mode="json")},
                **provenance.here(),
            }
            write_json(run.folder / "manifest.json", manifest)
            run.set_state("completed")


def _score(run: Run, adapter: Path | None, model: Model, data: Data, evaluation: Evaluation) -> None:
    file = run.evaluation(data.name)
    decoding: list[int | str] = [evaluation.max_tokens, model.dtype]
    if model.dtype in ("bfloat16", "float16"):  # where the batch may change an answer
        decoding.append(evaluation.batch_size)
    asked = digest([{"source": data.source, "eval": data.eval, "seed": data.seed}, decoding], 16)
    scored = scored_by(base_identity(model), None if adapter is None else adapter_sha256(adapter))
    if is_scored(file, asked, scored):
        return
    source = build("data.source", data.source)
    problems = source.problems("eval", data.eval, data.seed)
    base = load_model(base_source(model))
    with nullcontext(base.model) if adapter is None else carrying(base.model, adapter) as scored_model:
        outcomes = evaluate(
            scored_model,
            base.tokenizer,
            source,
            problems,
            max_tokens=evaluation.max_tokens,
            batch_size=evaluation.batch_size,
            description=f"{run.name} on {data.name}",
        )
    write_outcomes(outcomes, file, asked, scored)


def evaluate_job(config: DictConfig) -> None:
    """What `evaluate.py` does: scores every completed run of a sweep, and the base, on one benchmark."""
    checked = parse(EvaluateConfig, config)
    runs = [run for run in runs_of(checked.output_dir, checked.sweep) if run.status["state"] == "completed"]
    if not runs:
        raise InputError(f"sweep={checked.sweep}: no run is completed")
    table = Table("run", "accuracy", "95% interval", title=f"{checked.benchmark.name} (n = {checked.benchmark.eval})")
    refused = []
    for run in runs:
        try:
            _score_again(run, checked)
        except InputError as error:
            refused.append(str(error))
            continue
        correct = read_outcomes(run.evaluation(checked.benchmark.name))["correct"]
        low, high = wilson_interval(int(correct.sum()), len(correct))
        table.add_row(run.name, f"{correct.mean():.1%}", f"{low:.1%} – {high:.1%}")
    Console().print(table)
    if refused:
        raise InputError("; ".join(refused))


def _score_again(run: Run, config: EvaluateConfig) -> None:
    manifest = run.manifest
    model = Model.model_validate(manifest["config"]["model"])
    if manifest["method"] == "base":
        score_base(run.folder.parent, model, config.benchmark, config.evaluation)
        return
    with run.lock():
        if not run.is_trained():
            raise InputError(f"{run.folder}: no finished adapter in it")
        score_run(run, model, config.benchmark, config.evaluation)
