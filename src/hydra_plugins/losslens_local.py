"""Hydra plugin for `hydra/launcher=local`; Hydra finds plugins in this package only (see `losslens.scheduling`)."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from losslens.config.composed import Composed


class LocalLauncher(Launcher):
    """Runs the jobs of a command line on this machine, one per device at a time.

    Args:
        workers: Number of processes; None for one per visible GPU.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers = workers

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.composed = Composed(hydra_context.config_loader, config)
        self.task_function = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from losslens.scheduling.local.devices import choose_devices  # late: Hydra loads plugins at every start

        self.task_function.share_out(choose_devices(self.workers))
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.composed(overrides)
            with open_dict(config):
                config.hydra.job.num = number
            HydraConfig.instance().set_config(config)
            # The jobs are collected here and run together when the last one is known.
            with open_dict(config):
                del config["hydra"]
            self.task_function(config)
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]
