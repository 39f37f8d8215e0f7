"""What `train.py` does with a command line: its jobs one by one, then one table of all runs."""

from __future__ import annotations

import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from losslens import processes
from losslens.cli import one_line
from losslens.config import TrainConfig, parse
from losslens.errors import InputError
from losslens.job import Outcome, train_job
from losslens.plain_table import Table


class Sweep:
    """The jobs of one command and how they ended."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.sweep = ""

    def job(self, config: DictConfig) -> None:
        """Runs one job and says in a line how it ended."""
        with processes.one_job():
            try:
                checked = parse(TrainConfig, config)
                self.sweep = checked.sweep
                outcome = train_job(checked)
            except (InputError, OmegaConfBaseException) as error:
                choices = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
                outcome = Outcome(" ".join(choices) or "-", "failed", error=one_line(error), exit_status=2)
        self._tell(outcome)
        self.outcomes.append(outcome)
        if processes.broken():
            # The others wait for what will not come, or have ended: the launcher ends them all.
            sys.exit(1)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.error and not processes.is_main() and not processes.broken():
            return  # the main process says the same
        if outcome.error:
            if outcome.error not in {earlier.error for earlier in self.outcomes}:
                print(f"train.py: {outcome.error}", file=sys.stderr, flush=True)
        else:
            scored = "not scored" if outcome.accuracy is None else f"accuracy {outcome.accuracy:.1%}"
            print(f"{outcome.run}: {outcome.state}, {scored}", flush=True)

    def end(self) -> int:
        """Prints the table of a sweep; the exit status is 1 if a run failed at work, 2 if only input was bad."""
        processes.leave()
        if len(self.outcomes) > 1:
            table = Table("run", "state", "accuracy", "error", title=f"sweep {self.sweep}")
            shown = set()
            for outcome in self.outcomes:
                if outcome.run in shown and outcome.state in ("skipped", "diverged"):
                    continue  # once more by another name of its learning rate
                shown.add(outcome.run)
                accuracy = "" if outcome.accuracy is None else f"{outcome.accuracy:.1%}"
                table.add_row(outcome.run, outcome.state, accuracy, outcome.error)
            Console(soft_wrap=not sys.stdout.isatty()).print(table)
        statuses = {outcome.exit_status for outcome in self.outcomes}
        if statuses == {0}:
            print(f"Compare the weights:  python analyze.py sweep={self.sweep}")
        return 1 if 1 in statuses else max(statuses, default=0)
