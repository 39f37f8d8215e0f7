"""The workflow of `train.py`: runs the jobs of a command line one by one, then prints a table of all runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from losslens.config.overrides import number_of_jobs
from losslens.config.parse import parse, resolved
from losslens.config.training import TrainConfig
from losslens.core import distributed, provenance
from losslens.core.commands import command_name, format_command
from losslens.core.errors import InputError, ProcessError
from losslens.core.jobs import on_one_line
from losslens.core.notices import print_once
from losslens.core.terminal import Table
from losslens.models.devices import has_several_gpus
from losslens.pipeline.parallel import train_in_parallel
from losslens.pipeline.train_job import Outcome, train_job
from losslens.runs.current_words import readable_settings
from losslens.runs.labels import labels
from losslens.runs.run import Run
from losslens.scheduling.local.devices import Device

# Seconds between two checks of runs that other processes have locked; grows from the first to the second value.
_MIN_POLL, _MAX_POLL = 0.2, 5.0
# Seconds that a submitted job waits for a run that another process trains, as its allocation must not idle. A process
# that was told to stop (scancel, a time limit) has ended by then.
_PATIENCE_IN_JOB = 300.0


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


class SweepJobs:
    """The jobs of one command and their outcomes.

    Jobs that are locked by another process are deferred to the end, so that concurrent commands share the runs of a
    sweep.

    Args:
        devices: Devices to share the runs out to; none: one run after the other in this process.
    """

    def __init__(self, devices: Sequence[Device] = ()) -> None:
        self.sweep = ""
        self._devices = devices
        self._shared: dict[int, dict[str, Any]] = {}
        self._output_dir = Path("outputs")
        self._jobs: list[TrainConfig | None] = []
        self._outcomes: dict[int, Outcome] = {}
        self._deferred: dict[int, Run] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        """Outcomes of the jobs, in their order."""
        return [self._outcomes[number] for number in sorted(self._outcomes)]

    def job(self, config: DictConfig) -> None:
        """Runs one job and prints its outcome, or defers it if it is locked by another process.

        With several devices the jobs are run together in `end`.
        """
        number = len(self._jobs)
        self._jobs.append(None)
        if not self._devices and distributed.world_size() == 1 and _is_multirun() and has_several_gpus():
            print_once("Several GPUs are visible: hydra/launcher=local trains a run on each of them at once")
        with distributed.job_scope():
            try:
                content = resolved(TrainConfig, config)
                self._jobs[number] = checked = parse(TrainConfig, content)
                self.sweep, self._output_dir = checked.sweep, checked.output_dir
                if self._devices:
                    self._shared[number] = content
                    return
                outcome = train_job(checked, wait=False, jobs=number_of_jobs())
            except (InputError, OmegaConfBaseException) as error:
                # Not resolved: one of them may refer to a key that does not exist, which is what is reported here.
                choices: Any = []
                if HydraConfig.initialized():
                    choices = OmegaConf.to_container(HydraConfig.get().overrides.task)
                outcome = Outcome(" ".join(choices) or "-", "failed", error=on_one_line(error), exit_status=2)
        self._ended(number, outcome)

    def _ended(self, number: int, outcome: Outcome) -> None:
        if outcome.locked is not None:
            if number not in self._deferred:
                print(f"{outcome.locked.name}: locked by {outcome.locked.lock_holder}; left for later", flush=True)
            self._deferred[number] = outcome.locked
        else:
            self._deferred.pop(number, None)
        # If only the base was locked, the outcome of the run has been printed before.
        if outcome.state != "locked" and (number not in self._outcomes or outcome.error):
            self._print_outcome(outcome)
            self._outcomes[number] = outcome
        if distributed.desynchronised():
            # The other processes are stuck or have exited; the launcher terminates them all.
            sys.exit(1)

    def _run_deferred(self) -> None:
        """Runs the deferred jobs, each as soon as it is no longer locked."""
        while True:
            try:
                with distributed.job_scope():
                    number = distributed.broadcast(self._next_unlocked() if distributed.is_main() else None)
            except ProcessError:
                sys.exit(1)  # the main process was stopped while it waited, and reports that itself
            if number is None:
                return
            config = self._jobs[number]
            assert config is not None
            with distributed.job_scope():
                outcome = train_job(config, wait=False)
            self._ended(number, outcome)

    def _next_unlocked(self) -> int | None:
        """Waits until a deferred job is no longer locked and returns its number; None if no jobs are deferred."""
        pause, printed, start = _MIN_POLL, "", time.monotonic()
        while self._deferred:
            unlocked = [number for number, run in self._deferred.items() if not run.is_locked]
            if unlocked:
                return unlocked[0]
            locked = {run.name: f"{run.name} ({run.lock_holder})" for run in self._deferred.values()}
            if (message := f"waiting for {', '.join(locked.values())}") != printed and pause > 2 * _MIN_POLL:
                print(message, flush=True)
                printed = message
            if provenance.JOB_LOG in os.environ and time.monotonic() - start > _PATIENCE_IN_JOB:
                self._leave_to_others()
                continue
            time.sleep(pause)
            pause = min(1.5 * pause, _MAX_POLL)
        return None

    def _leave_to_others(self) -> None:
        """Ends the deferred jobs; what is locked is trained or scored by those that have locked it."""
        for number, run in list(self._deferred.items()):
            if number in self._outcomes:  # only the base was locked; the run of this job is completed
                self._deferred.pop(number)
            else:
                error = f"{run.name}: locked by {run.lock_holder}, which trains it; this job ends"
                self._ended(number, Outcome(run.name, "failed", error=error, exit_status=1))

    def _print_outcome(self, outcome: Outcome) -> None:
        if outcome.error and not distributed.is_main() and not distributed.desynchronised():
            return  # the main process prints the same error
        if outcome.error:
            if outcome.error not in {earlier.error for earlier in self._outcomes.values()}:
                print(f"{command_name('train.py')}: {outcome.error}", file=sys.stderr, flush=True)
        else:
            scored = "not scored" if outcome.accuracy is None else f"accuracy {outcome.accuracy:.1%}"
            print(f"{outcome.run}: {outcome.state}, {scored}", flush=True)

    @property
    def _all_failed_alike(self) -> bool:
        errors = {outcome.error for outcome in self.outcomes}
        return len(errors) == 1 and "" not in errors

    def end(self) -> int:
        """Runs the jobs that are left and prints the table of the sweep.

        Returns:
            The exit status: 1 if a run failed during its work, 2 if only input was invalid.
        """
        if self._shared:
            train_in_parallel(self._shared, self._devices, self._ended)
        self._run_deferred()
        distributed.close_store()
        # If all jobs failed with the same error, which has been printed, a table adds nothing.
        if len(self.outcomes) > 1 and not self._all_failed_alike:
            table = Table("run", "settings", "state", "accuracy", "error", title=f"sweep {self.sweep}")
            settings = self._labels()
            shown, errors = set(), set()
            for outcome in self.outcomes:
                if outcome.run in shown and outcome.state in ("skipped", "diverged"):
                    continue  # the same run under another name of its learning rate
                shown.add(outcome.run)
                accuracy = "" if outcome.accuracy is None else f"{outcome.accuracy:.1%}"
                error = "as above" if outcome.error in errors else outcome.error
                table.add_row(outcome.run, settings.get(outcome.run, ""), outcome.state, accuracy, error)
                errors |= {outcome.error} - {""}
            Console(width=None if sys.stdout.isatty() else 150, soft_wrap=not sys.stdout.isatty()).print(table)
        statuses = {outcome.exit_status for outcome in self.outcomes}
        if statuses == {0}:
            print(f"Compare the weights:  {format_command('analyze.py', self.sweep, self._output_dir)}")
        return 1 if 1 in statuses else max(statuses, default=0)

    def _labels(self) -> dict[str, str]:
        """Labels of the started runs by the settings in which they differ; their names show these only as a hash."""
        settings = {}
        for name in {outcome.run for outcome in self.outcomes}:
            with suppress(InputError, KeyError, TypeError):
                manifest = Run(self._output_dir / self.sweep / name).manifest
                settings[name] = readable_settings(manifest["identity"], manifest.get("options") or {})
        return labels(settings)
