"""Finds outcomes of runs on the same problems in the same way, and names their benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from losslens.evaluation.outcomes import task_fingerprint
from losslens.runs.run import Run


class Scores:
    """The outcome files of runs by benchmark.

    A benchmark is named after its problems. If it was scored in several ways (different problems or token limits), the
    most common way (of two, the first) keeps the name and the others get a hash appended.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, Path]]) -> None:
        self._files = files

    def benchmarks(self, run: Run) -> list[str]:
        """Returns the benchmarks that a run was scored on."""
        return sorted(self._files.get(run.folder, {}))

    def file(self, run: Run, benchmark: str) -> Path:
        """Returns the outcome file of a run on a benchmark."""
        return self._files[run.folder][benchmark]


def scores_of_runs(runs: Sequence[Run]) -> Scores:
    """Finds the outcomes of `runs`.

    Raises:
        InputError: A file cannot be read.
    """
    tasks = {
        run.folder: {file: task_fingerprint(file) for file in sorted(run.folder.glob("eval/*.parquet"))} for run in runs
    }
    votes_by_name: dict[str, dict[str, float]] = {}
    for files in tasks.values():
        for file, task in files.items():
            # Ties go to the file without a hash in its name, which was written first.
            written_first = file.stem == _name(file, task)
            votes = votes_by_name.setdefault(_name(file, task), {})
            votes[task] = votes.get(task, 0) + 1 + written_first / (2 * len(tasks))
    usual = {name: max(sorted(votes), key=votes.__getitem__) for name, votes in votes_by_name.items()}
    return Scores(
        {
            folder: {
                name if task == usual[name] else f"{name}-{task[:8]}": file
                for file, task in files.items()
                for name in [_name(file, task)]
            }
            for folder, files in tasks.items()
        }
    )


def _name(file: Path, task: str) -> str:
    """Returns the name of the benchmark, without the hash that scoring may append."""
    return file.stem.removesuffix(f"-{task[:8]}")
