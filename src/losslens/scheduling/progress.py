"""Accuracy and remaining time of runs, read from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.core.files import read_json, read_parquet
from losslens.runs.current_words import readable_settings
from losslens.runs.integrity import matches_recorded_hash
from losslens.runs.labels import labels
from losslens.runs.run import Run
from losslens.scheduling.status import RunStatus

# A run that is this many seconds overdue without an update is not considered active.
_OVERDUE_SECONDS = 60.0


def accuracies(runs: Sequence[Run]) -> dict[Run, float]:
    """Returns the greedy accuracy on the first benchmark of each run that has been scored.

    The base has no benchmark of its own; it is scored on that of the runs.
    """
    names = {run: _benchmark(_manifest(run)) for run in runs}
    default = next((name for name in names.values() if name), None)
    by_run = {run: _accuracy(run, names[run] or (default if run.name.startswith("base-") else None)) for run in runs}
    return {run: accuracy for run, accuracy in by_run.items() if accuracy is not None}


def seconds_left(status: Mapping[str, Any], now: datetime | None = None) -> float | None:
    """Returns the remaining training time of a running run in seconds; None if it is unknown."""
    try:
        if status["state"] != "running":
            return None
        since = ((now or datetime.now(UTC)) - datetime.fromisoformat(status["time"])).total_seconds()
        left = (status["max_steps"] - status["step"]) * status["seconds_per_step"] - since
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return None if left < -_OVERDUE_SECONDS else max(left, 0.0)


def sweep_left(run_statuses: Sequence[RunStatus], now: datetime | None = None) -> float | None:
    """Returns the remaining training time of a sweep in seconds; None if it is unknown.

    Assumes that as many runs train in parallel as now, and that waiting runs take as long as the others on average.
    """
    running = [left for each in run_statuses if (left := seconds_left(each.status, now)) is not None]
    waiting = [each for each in run_statuses if each.state in ("queued", "preempted") and not each.is_over]
    if not running:
        return None
    if not waiting:
        return max(running)
    totals = [seconds for each in run_statuses if (seconds := _total_seconds(each)) is not None]
    remaining = sum(running) + len(waiting) * sum(totals) / len(totals)
    return max(*running, remaining / len(running))


def duration(seconds: float) -> str:
    """Formats a duration: `2 h 05 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def short_labels(runs: Sequence[Run]) -> dict[Run, str]:
    """Returns labels of the runs by the settings in which they differ; empty if their names differ without the hash."""
    stems = [run.name.rpartition("-")[0] for run in runs]
    if len(set(stems)) == len(stems):
        return {}
    by_name = {run.name: run for run in runs}
    known = {run.name: settings for run in runs if (settings := _settings(run)) is not None}
    return {by_name[name]: label for name, label in labels(known).items()}


def _total_seconds(run_status: RunStatus) -> float | None:
    """Duration of a run's whole training in seconds, measured or estimated."""
    status = run_status.status
    try:
        if run_status.state == "completed":
            return float(_manifest(run_status.run)["training"]["seconds"])
        return float(status["max_steps"] * status["seconds_per_step"])
    except (KeyError, TypeError, ValueError):
        return None


def _manifest(run: Run) -> dict[str, Any]:
    file = run.folder / "manifest.json"
    try:
        return _read(file, file.stat().st_mtime_ns)
    except (OSError, InputError):
        return {}


@lru_cache(maxsize=4096)
def _read(file: Path, _: int) -> dict[str, Any]:
    content = read_json(file)
    return content if isinstance(content, dict) else {}


def _settings(run: Run) -> dict[str, Any] | None:
    manifest = _manifest(run)
    try:
        return readable_settings(manifest["identity"], manifest["options"])
    except (KeyError, TypeError):
        return None


def _benchmark(manifest: Mapping[str, Any]) -> str | None:
    """Name of the first benchmark of a run."""
    try:
        config = manifest["config"]
        first = next(iter(config["benchmark"].values()), None)
        return str(first["name"] if first else config["data"]["name"])
    except (KeyError, TypeError, AttributeError):
        return None


def _accuracy(run: Run, benchmark: str | None) -> float | None:
    file = run.evaluation(benchmark or "")
    try:
        if not benchmark:
            return None
        # The hash of the outcomes is written after them.
        written = (file.stat().st_mtime_ns, (run.folder / "manifest.json").stat().st_mtime_ns)
        return _mean_correct(run.folder, file, written)
    except (OSError, InputError, KeyError):
        return None


@lru_cache(maxsize=4096)
def _mean_correct(folder: Path, file: Path, _: tuple[int, int]) -> float | None:
    if matches_recorded_hash(folder, file) is False:
        return None
    correct = [value for value in read_parquet(file)["correct"].to_pylist() if isinstance(value, bool)]
    return sum(correct) / len(correct) if correct else None
