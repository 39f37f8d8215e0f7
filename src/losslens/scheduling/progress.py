"""How accurate runs are and how long they will take, as far as their folders say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from losslens.core.errors import InputError
from losslens.core.files import read_json
from losslens.runs.current_words import settings_of
from losslens.runs.labels import labels
from losslens.runs.run import Run
from losslens.scheduling.status import RunStatus

# Seconds after which a run that should have ended, and says nothing, is not taken to be at work.
_SILENT = 60.0


def accuracies(runs: Sequence[Run]) -> dict[Run, float]:
    """The share of right greedy answers on the first benchmark, of the runs that are scored.

    The base is scored on what the runs are, and has none of its own.
    """
    names = {run: _benchmark(_manifest(run)) for run in runs}
    usual = next((name for name in names.values() if name), None)
    found = {run: _correct(run, names[run] or (usual if run.name.startswith("base-") else None)) for run in runs}
    return {run: share for run, share in found.items() if share is not None}


def seconds_left(status: Mapping[str, Any], now: datetime | None = None) -> float | None:
    """Seconds of training that a running run has before it; None where that is not known."""
    try:
        if status["state"] != "running":
            return None
        since = ((now or datetime.now(UTC)) - datetime.fromisoformat(status["time"])).total_seconds()
        left = (status["max_steps"] - status["step"]) * status["seconds_per_step"] - since
    except (KeyError, TypeError, ValueError):
        return None
    return None if left < -_SILENT else max(left, 0.0)


def sweep_left(found: Sequence[RunStatus], now: datetime | None = None) -> float | None:
    """Seconds until all that runs or waits is trained, by as many at once as run now; None where that is not known."""
    running = [left for each in found if (left := seconds_left(each.status, now)) is not None]
    waiting = [each for each in found if each.state in ("queued", "preempted") and not each.is_over]
    if not running:
        return None
    if not waiting:
        return max(running)
    whole = [length for each in found if (length := _length(each)) is not None]
    total = sum(running) + len(waiting) * sum(whole) / len(whole)
    return max(*running, total / len(running))


def duration(seconds: float) -> str:
    """`2 h 05 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def short_labels(runs: Sequence[Run]) -> dict[Run, str]:
    """What tells each run from the others, where some differ by the hash in their name alone; else nothing."""
    plain = [run.name.rpartition("-")[0] for run in runs]
    if len(set(plain)) == len(plain):
        return {}
    by_name = {run.name: run for run in runs}
    known = {run.name: settings for run in runs if (settings := _settings(run)) is not None}
    return {by_name[name]: label for name, label in labels(known).items()}


def _length(run_status: RunStatus) -> float | None:
    """Seconds that a run's training takes, or took."""
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
        return settings_of(manifest["identity"], manifest["options"])
    except (KeyError, TypeError):
        return None


def _benchmark(manifest: Mapping[str, Any]) -> str | None:
    """The name of what a run is scored on first."""
    try:
        config = manifest["config"]
        first = next(iter(config["benchmark"].values()), None)
        return str(first["name"] if first else config["data"]["name"])
    except (KeyError, TypeError, AttributeError):
        return None


def _correct(run: Run, benchmark: str | None) -> float | None:
    file = run.evaluation(benchmark or "")
    try:
        return _share(file, file.stat().st_mtime_ns) if benchmark else None
    except (OSError, pa.ArrowException, ValueError, TypeError):
        return None


@lru_cache(maxsize=4096)
def _share(file: Path, _: int) -> float | None:
    correct = pq.read_table(file, columns=["correct"])["correct"].to_pylist()
    return sum(correct) / len(correct) if correct else None
