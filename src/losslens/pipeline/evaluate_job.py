"""The job of `evaluate.py`: scores the completed runs of a sweep, and their bases, on benchmarks."""

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
from losslens.core.errors import InputError, ServerError, ServerStartError
from losslens.core.terminal import Table
from losslens.evaluation.outcomes import (
    read_outcomes,
)
from losslens.evaluation.score import benchmark_name, sample_counts, score_base, score_run
from losslens.evaluation.statistics import wilson_interval
from losslens.runs.integrity import require_own_manifest
from losslens.runs.recorded import Trust, model_of
from losslens.runs.run import LockedError, Run, base_identity, base_run, runs_of

if TYPE_CHECKING:
    import pandas as pd


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
