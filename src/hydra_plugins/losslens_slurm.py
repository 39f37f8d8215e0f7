"""Hydra plugin for `hydra/launcher=slurm`; Hydra finds plugins in this package only (see `losslens.scheduling`)."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from losslens.config.composed import Composed


class SlurmLauncher(Launcher):
    """Submits the jobs of a command line to Slurm instead of running them.

    Args:
        wait: Wait until all jobs have ended, and show a live table.
        dry_run: Only print what would be submitted.
    """

    def __init__(self, wait: bool, dry_run: bool) -> None:
        self.wait = wait
        self.dry_run = dry_run

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.composed = Composed(hydra_context.config_loader, config)
        self.task_function = task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from losslens.core.extras import require_extras  # imported late: Hydra loads plugins at every start

        require_extras("slurm")
        from losslens.scheduling.slurm.launch import launch

        configs = [self.composed(overrides) for overrides in job_overrides]
        for config in configs:
            self.task_function.require_packages(config)
        launch(
            self.task_function.script,
            configs,
            wait=self.wait,
            dry_run=self.dry_run,
        )
        return [JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED) for overrides in job_overrides]
