"""Scores of a sweep's runs, from several processes on this machine, one per device (`hydra/launcher=local`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from losslens.config.evaluation import EvaluateConfig
from losslens.config.parse import resolved
from losslens.core.errors import InputError, ServerError, WorkerDiedError
from losslens.evaluation.score import SweepScores, evaluate_job
from losslens.scheduling.local.devices import Device
from losslens.scheduling.local.live import printer
from losslens.scheduling.local.pool import Pool, run_all


def evaluate_in_parallel(config: DictConfig, devices: Sequence[Device]) -> None:
    """Runs the job of `evaluate.py`: as many runs are scored at once as there are devices.

    Args:
        config: The configuration.
        devices: The devices.
    """
    content = resolved(EvaluateConfig, config)
    names = [run.name for run in SweepScores(content).runs]
    with Pool(_score, devices, printer()) as pool:
        ended = run_all(pool, [(content, name) for name in names])
    errors = (WorkerDiedError(f"{names[task.key]}: {task.death}") if task.death else task.result for task in ended)
    evaluate_job(config, {name: error for name, error in zip(names, errors, strict=True) if error is not None})


def _score(task: tuple[dict[str, Any], str]) -> InputError | ServerError | None:
    """Scores a run in a worker; returns the error if it fails."""
    config, name = task
    try:
        sweep = SweepScores(config)
        sweep.score(next(run for run in sweep.runs if run.name == name), wait=True)
    except (InputError, ServerError) as error:
        return (ServerError if isinstance(error, ServerError) else InputError)(str(error))
    return None
