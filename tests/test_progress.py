"""Accuracy, remaining time and labels in the status table."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from losslens.core.files import write_json
from losslens.runs.run import Run
from losslens.scheduling.monitor import table
from losslens.scheduling.progress import accuracies, duration, seconds_left, short_labels, sweep_left
from losslens.scheduling.slurm.cluster import JobState
from losslens.scheduling.status import RunStatus

pytestmark = pytest.mark.fast

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def run_status(folder: Path, **status: Any) -> RunStatus:
    return RunStatus(Run(folder), {"time": NOW.isoformat(), **status}, None, None, False, "")


def run(folder: Path, correct: list[bool], benchmark: dict[str, Any], **identity: Any) -> Run:
    config = {"data": {"name": "own"}, "benchmark": benchmark}
    write_json(
        folder / "manifest.json", {"config": config, "identity": identity, "options": {}, "training": {"seconds": 30.0}}
    )
    for name in ("own", "first", "second"):
        (folder / "eval").mkdir(exist_ok=True)
        values = correct if name == (next(iter(benchmark), None) or "own") else [False]
        pq.write_table(pa.table({"correct": values}), folder / "eval" / f"{name}.parquet")
    return Run(folder)


def test_the_accuracy_is_that_of_the_first_benchmark(tmp_path: Path) -> None:
    both = {"first": {"name": "first"}, "second": {"name": "second"}}
    runs = [
        run(tmp_path / "sft-1", [True, True, False, False], both),
        run(tmp_path / "dft-1", [True, False, False, False], {}),
        Run(tmp_path / "rft-1"),
    ]
    base = Run(tmp_path / "base-tiny-1")
    write_json(base.folder / "manifest.json", {"config": {"model": {}}})
    (base.folder / "eval").mkdir()
    pq.write_table(pa.table({"correct": [True]}), base.folder / "eval" / "first.parquet")
    assert accuracies([base, *runs]) == {base: 1.0, runs[0]: 0.5, runs[1]: 0.25}
    (runs[0].folder / "eval" / "first.parquet").write_bytes(b"PAR1")
    assert runs[0] not in accuracies(runs)


def test_remaining_time_of_a_run() -> None:
    status = {"state": "running", "step": 40, "max_steps": 100, "seconds_per_step": 2.0, "time": NOW.isoformat()}
    assert seconds_left(status, NOW + timedelta(seconds=20)) == 100
    assert seconds_left(status, NOW + timedelta(seconds=130)) == 0
    assert seconds_left(status, NOW + timedelta(hours=1)) is None  # killed, most likely
    assert seconds_left({**status, "state": "completed"}, NOW) is None
    for lacking in ("seconds_per_step", "max_steps", "time"):
        assert seconds_left({k: v for k, v in status.items() if k != lacking}, NOW) is None
    assert seconds_left({**status, "time": "noon"}, NOW) is None


def test_remaining_time_of_a_sweep(tmp_path: Path) -> None:
    """Two run, of 60 and 100 s; one that waits takes as long as the others: (200 + 200) / 2 and 30 s."""
    running = [
        run_status(tmp_path / name, state="running", step=step, max_steps=100, seconds_per_step=2.0)
        for name, step in (("a", 70), ("b", 50))
    ]
    assert sweep_left(running, NOW) == 100
    run(tmp_path / "done", [True], {})
    done = run_status(tmp_path / "done", state="completed")
    waiting = RunStatus(Run(tmp_path / "c"), {"state": "queued"}, "12", JobState("PENDING", ""), True, "")
    assert sweep_left([*running, waiting], NOW) == pytest.approx((60 + 100 + 200) / 2)
    assert sweep_left([*running, waiting, done], NOW) == pytest.approx((160 + (200 + 200 + 30) / 3) / 2)
    assert sweep_left([done, waiting], NOW) is None
    assert [duration(seconds) for seconds in (40, 720, 7500)] == ["40 s", "12 min", "2 h 05 min"]


def test_runs_with_equal_names_except_for_the_hash_get_labels(tmp_path: Path) -> None:
    method = {"name": "dpo", "beta": 0.1}
    one = run(tmp_path / "dpo-conventional-r8-tiny-s42-1", [True], {}, method=method, init_seed=42)
    other = run(tmp_path / "dpo-conventional-r8-tiny-s42-2", [True], {}, method=method, init_seed=1)
    assert short_labels([one, other]) == {one: "dpo init 42", other: "dpo init 1"}
    assert short_labels([one]) == {}
    console = Console(width=240, record=True)
    console.print(table([run_status(each.folder, state="completed") for each in (one, other)]))
    assert "dpo init 1 " in console.export_text()
