"""What `train.py` does with a command line: its jobs one by one, then one table of all runs."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core import distributed
from losslens.core.commands import called, format_command
from losslens.core.errors import InputError, ProcessError
from losslens.core.jobs import on_one_line
from losslens.core.terminal import Table
from losslens.pipeline.train_job import Outcome, train_job
from losslens.runs.current_words import settings_of
from losslens.runs.labels import labels
from losslens.runs.run import Run

# Seconds between two looks at what other processes are at: soon at first, and then seldom.
_FIRST_LOOK, _LAST_LOOK = 0.2, 5.0


class Sweep:
    """The jobs of one command and how they ended.

    What another process is at is left for later: two commands at once share the runs, and each waits at its end only.
    """

    def __init__(self) -> None:
        self.sweep = ""
        self._output_dir = Path("outputs")
        self._jobs: list[TrainConfig | None] = []
        self._outcomes: dict[int, Outcome] = {}
        self._later: dict[int, Run] = {}

    @property
    def outcomes(self) -> list[Outcome]:
        """How the jobs ended, in their order."""
        return [self._outcomes[number] for number in sorted(self._outcomes)]

    def job(self, config: DictConfig) -> None:
        """Runs one job and says in a line how it ended, or that it is left for later."""
        number = len(self._jobs)
        self._jobs.append(None)
        with distributed.job_scope():
            try:
                self._jobs[number] = checked = parse(TrainConfig, config)
                self.sweep, self._output_dir = checked.sweep, checked.output_dir
                outcome = train_job(checked, wait=False)
            except (InputError, OmegaConfBaseException) as error:
                choices = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
                outcome = Outcome(" ".join(choices) or "-", "failed", error=on_one_line(error), exit_status=2)
        self._ended(number, outcome)

    def _ended(self, number: int, outcome: Outcome) -> None:
        if outcome.held is not None:
            if number not in self._later:
                print(f"{outcome.held.name}: {outcome.held.lock_holder} is at it; left for later", flush=True)
            self._later[number] = outcome.held
        else:
            self._later.pop(number, None)
        # What was done before the base was waited for is told already.
        if outcome.state != "held" and (number not in self._outcomes or outcome.error):
            self._tell(outcome)
            self._outcomes[number] = outcome
        if distributed.desynchronised():
            # The others wait for what will not come, or have ended: the launcher ends them all.
            sys.exit(1)

    def _come_back(self) -> None:
        """Does what was left for later, each job as soon as nobody else is at it."""
        while True:
            try:
                with distributed.job_scope():
                    number = distributed.broadcast(self._next() if distributed.is_main() else None)
            except ProcessError:
                sys.exit(1)  # the main process was stopped while it waited, and says so itself
            if number is None:
                return
            config = self._jobs[number]
            assert config is not None
            with distributed.job_scope():
                outcome = train_job(config, wait=False)
            self._ended(number, outcome)

    def _next(self) -> int | None:
        """The first job that was left for later and that nobody is at any more; waits for one. None when none is."""
        pause, said = _FIRST_LOOK, ""
        while self._later:
            free = [number for number, run in self._later.items() if not run.is_locked]
            if free:
                return free[0]
            held = {run.name: f"{run.name} ({run.lock_holder})" for run in self._later.values()}
            if (waiting := f"waiting for {', '.join(held.values())}") != said and pause > 2 * _FIRST_LOOK:
                print(waiting, flush=True)
                said = waiting
            time.sleep(pause)
            pause = min(1.5 * pause, _LAST_LOOK)
        return None

    def _tell(self, outcome: Outcome) -> None:
        if outcome.error and not distributed.is_main() and not distributed.desynchronised():
            return  # the main process says the same
        if outcome.error:
            if outcome.error not in {earlier.error for earlier in self._outcomes.values()}:
                print(f"{called('train.py')}: {outcome.error}", file=sys.stderr, flush=True)
        else:
            scored = "not scored" if outcome.accuracy is None else f"accuracy {outcome.accuracy:.1%}"
            print(f"{outcome.run}: {outcome.state}, {scored}", flush=True)

    @property
    def _were_refused_alike(self) -> bool:
        errors = {outcome.error for outcome in self.outcomes}
        return len(errors) == 1 and "" not in errors

    def end(self) -> int:
        """Does what was left for later, and prints the table of a sweep.

        Returns:
            The exit status: 1 if a run failed at work, 2 if only input was bad.
        """
        self._come_back()
        distributed.close_store()
        # Where all were refused for one reason, which is told, there is nothing to add.
        if len(self.outcomes) > 1 and not self._were_refused_alike:
            table = Table("run", "what", "state", "accuracy", "error", title=f"sweep {self.sweep}")
            what = self._labels()
            shown, told = set(), set()
            for outcome in self.outcomes:
                if outcome.run in shown and outcome.state in ("skipped", "diverged"):
                    continue  # once more by another name of its learning rate
                shown.add(outcome.run)
                accuracy = "" if outcome.accuracy is None else f"{outcome.accuracy:.1%}"
                error = "as above" if outcome.error in told else outcome.error
                table.add_row(outcome.run, what.get(outcome.run, ""), outcome.state, accuracy, error)
                told |= {outcome.error} - {""}
            Console(width=None if sys.stdout.isatty() else 150, soft_wrap=not sys.stdout.isatty()).print(table)
        statuses = {outcome.exit_status for outcome in self.outcomes}
        if statuses == {0}:
            print(f"Compare the weights:  {format_command('analyze.py', self.sweep, self._output_dir)}")
        return 1 if 1 in statuses else max(statuses, default=0)

    def _labels(self) -> dict[str, str]:
        """What tells the runs apart, which their names do by a hash alone; nothing of those that were not started."""
        settings = {}
        for name in {outcome.run for outcome in self.outcomes}:
            with suppress(InputError, KeyError, TypeError):
                manifest = Run(self._output_dir / self.sweep / name).manifest
                settings[name] = settings_of(manifest["identity"], manifest.get("options") or {})
        return labels(settings)
