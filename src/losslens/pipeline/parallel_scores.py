"""Scores of a sweep's runs, from several processes on this machine, one per device (`hydra/launcher=local`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from losslens.config.evaluation import EvaluateConfig
from losslens.config.parse import resolved
from losslens.core.errors import InputError, ServerError, ServerStartError, WorkerDiedError, as_result
from losslens.pipeline.evaluate_job import SweepScores, evaluate_job
from losslens.scheduling.local.devices import Device
from losslens.scheduling.local.live import printer
from losslens.scheduling.local.pool import Pool, run_all, server_did_not_start


def evaluate_in_parallel(config: DictConfig, devices: Sequence[Device]) -> None:
    """Runs the job of `evaluate.py`: as many runs are scored at once as there are devices.

    Args:
        config: The configuration.
        devices: The devices.

    Raises:
        ServerStartError: A server did not start, as it would not for any other run.
    """
    content = resolved(EvaluateConfig, config)
    names = [run.name for run in SweepScores(content).runs]
    with Pool(_score, devices, printer()) as pool:
        ended = run_all(pool, [(content, name) for name in names], until=server_did_not_start)
    failed = {
        names[task.key]: WorkerDiedError(f"{names[task.key]}: {task.death}") if task.death else task.result
        for task in ended
        if task.death or task.result is not None
    }
    for error in failed.values():
        if isinstance(error, ServerStartError):
            raise error
    evaluate_job(config, failed)


def _score(task: tuple[dict[str, Any], str]) -> InputError | ServerError | None:
    """Scores a run in a worker; returns the error if it fails."""
    config, name = task
    try:
        sweep = SweepScores(config)
        sweep.score(next(run for run in sweep.runs if run.name == name), wait=True)
    except (InputError, ServerError) as error:
        return as_result(error)
    return None
