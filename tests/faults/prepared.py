"""Output folders with which the commands under test begin, made once for all test processes."""

from __future__ import annotations

import tarfile
from pathlib import Path

from filelock import FileLock

from tests.conftest import ROOT, remove_outcomes
from tests.faults.campaign import ANALYZE, ROLLOUTS, TRAIN, Command, run


class Prepared:
    """The commands under test, each with the output folder that it begins with.

    Args:
        folder: Folder of the output folders, the same for all test processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def rollout(self) -> Command:
        return Command("rollout.py", ("rollout.py", *ROLLOUTS))

    @property
    def train(self) -> Command:
        return Command("train.py", ("train.py", "method=dpo", *TRAIN), self._after("sampled", self.rollout))

    @property
    def workers(self) -> Command:
        """A sweep of two runs, with two workers."""
        line = ("train.py", "-m", "method=sft,dpo", "workers=2", *TRAIN)
        return Command("train.py workers=2", line, self._after("sampled", self.rollout))

    @property
    def sweep(self) -> Command:
        """The same in one process."""
        return Command(
            "train.py -m", ("train.py", "-m", "method=sft,dpo", *TRAIN), self._after("sampled", self.rollout)
        )

    @property
    def evaluate(self) -> Command:
        line = ("evaluate.py", "sweep=main", "benchmark=arithmetic", "benchmark.arithmetic.eval_size=4")
        return Command("evaluate.py", line, self._after("unscored", self.sweep, _unscore))

    @property
    def analyze(self) -> Command:
        return Command("analyze.py", ("analyze.py", "sweep=main", *ANALYZE), self._after("trained", self.sweep))

    @property
    def migrate(self) -> Command:
        made = self.folder / "earlier"
        with FileLock(self.folder / "earlier.lock"):
            if not made.exists():
                with tarfile.open(ROOT / "tests" / "outputs_of_before.tar.gz") as archive:
                    archive.extractall(self.folder / "unpacked", filter="data")
                (self.folder / "unpacked" / "outputs").rename(made)
        return Command("launch/migrate.py", ("launch/migrate.py",), made)

    def _after(self, name: str, command: Command, change=lambda folder: None) -> Path:
        """What a command leaves. It is made under the path of no test, which must not matter."""
        made = self.folder / name
        with FileLock(self.folder / f"{name}.lock"):
            if not made.exists():
                output = command.fresh(self.folder / f"making-{name}")
                outcome = run(command, output)
                assert outcome.status == 0, f"{outcome.stdout[-2000:]}\n{outcome.stderr[-3000:]}"
                change(output)
                output.rename(made)
        return made


def _unscore(output: Path) -> None:
    for file in output.glob("main/*/eval/*.parquet"):
        remove_outcomes(file)
