"""Which outcomes of the runs answer the same problems in the same way, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from losslens.evaluation.outcomes import task_fingerprint
from losslens.runs.run import Run


class Scores:
    """The outcome files of runs by benchmark.

    A benchmark's name is that of its problems. Where it was also asked in another way (other problems, another token
    limit), the way that most runs were asked keeps the name (of two, the one that came first), and the others carry a
    hash beside it.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, Path]]) -> None:
        self._files = files

    def benchmarks(self, run: Run) -> list[str]:
        """The benchmarks that a run was scored on."""
        return sorted(self._files.get(run.folder, {}))

    def file(self, run: Run, benchmark: str) -> Path:
        """A run's outcomes on a benchmark that it was scored on."""
        return self._files[run.folder][benchmark]


def scores_of_runs(runs: Sequence[Run]) -> Scores:
    """The outcomes of `runs`.

    Raises:
        InputError: A file cannot be read.
    """
    found = {
        run.folder: {file: task_fingerprint(file) for file in sorted(run.folder.glob("eval/*.parquet"))} for run in runs
    }
    ways: dict[str, dict[str, float]] = {}
    for files in found.values():
        for file, asked in files.items():
            # A file without a hash in its name came first: that decides where as many runs were asked either way.
            came_first = file.stem == _name(file, asked)
            votes = ways.setdefault(_name(file, asked), {})
            votes[asked] = votes.get(asked, 0) + 1 + came_first / (2 * len(found))
    usual = {name: max(sorted(votes), key=votes.__getitem__) for name, votes in ways.items()}
    return Scores(
        {
            folder: {
                name if asked == usual[name] else f"{name}-{asked[:8]}": file
                for file, asked in files.items()
                for name in [_name(file, asked)]
            }
            for folder, files in found.items()
        }
    )


def _name(file: Path, asked: str) -> str:
    """The benchmark's own name: `scoring.py` puts the hash after it."""
    return file.stem.removesuffix(f"-{asked[:8]}")
