"""Rollouts of several jobs from several processes on this machine, one per device (`hydra/launcher=local`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from losslens.config.parse import parse  # noqa: F401  # registers the interpolations in a worker
from losslens.core.commands import command_name
from losslens.core.errors import InputError, ServerError, WorkerDiedError
from losslens.rollouts.sample import rollout_job
from losslens.scheduling.local.devices import Device
from losslens.scheduling.local.pool import Pool, run_all


class RolloutJobs:
    """The jobs of one command: rollouts of different models or problems. Those of one job are sampled by one process.

    Args:
        devices: Devices to share the jobs out to.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._configs: list[DictConfig] = []

    def job(self, config: DictConfig) -> None:
        """Adds a job."""
        self._configs.append(config)

    def end(self) -> int:
        """Runs the jobs.

        Returns:
            The exit status: 1 if a server did not answer or a process was killed, 2 if only input was invalid.
        """
        with Pool(_sample, self._devices, _print) as pool:
            ended = run_all(pool, self._configs)
        errors = [WorkerDiedError(f"job {task.key}: {task.death}") if task.death else task.result for task in ended]
        for line in dict.fromkeys(str(error) for error in errors if error is not None):
            _print(f"{command_name('rollout.py')}: {line}", True)
        statuses = {1 if isinstance(error, ServerError) else 2 for error in errors if error is not None}
        return min(statuses, default=0)


def _sample(config: DictConfig) -> InputError | ServerError | None:
    """Samples the rollouts of a job in a worker; returns the error if it fails."""
    try:
        rollout_job(config)
    except (InputError, ServerError) as error:
        return (ServerError if isinstance(error, ServerError) else InputError)(str(error))
    return None


def _print(line: str, is_error: bool) -> None:
    print(line, file=sys.stderr if is_error else sys.stdout, flush=True)
