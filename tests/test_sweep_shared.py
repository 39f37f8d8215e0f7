"""Two commands on one sweep: each takes the runs that are not locked, then the rest."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock

from losslens.runs.run import runs_of
from tests.conftest import command, remove_outcomes, script, start
from tests.test_sweep import FEW, adapters


def _until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def _lock(output_dir: Path, sweep: Path, method: str) -> Path:
    """The lock of a run, or of the base, in another output folder; its name is that of the same run in `sweep`."""
    [name] = [run.name for run in runs_of(sweep, "main") if run.name.startswith(f"{method}-")]
    return output_dir / "main" / f".{name.rpartition('-')[2]}.lock"


def test_locked_runs_are_left_for_later(sweep: Path, tmp_path: Path) -> None:
    """While the first run and the base are locked, the second run is trained; the others follow."""
    (tmp_path / "main").mkdir()
    shutil.copytree(sweep / "rollouts", tmp_path / "rollouts")
    line = command(tmp_path, "-m", "method=sft,rft", FEW, "logger=none")
    with ExitStack() as stack:
        for method in ("sft", "base"):
            stack.enter_context(FileLock(_lock(tmp_path, sweep, method)))
        with start(*line) as process:
            done = tmp_path / "main" / next(run.name for run in runs_of(sweep, "main") if run.name.startswith("rft-"))
            _until(lambda: (done / "eval" / "arithmetic.parquet").exists())
            assert not list(tmp_path.glob("main/sft-*/adapter"))
            assert not list(tmp_path.glob("main/base-*/eval/*.parquet"))
            _until(lambda: "waiting for sft-" in process.stdout)
            stack.close()
            assert process.wait() == 0, process.stderr
            said = process.stdout
    assert said.index("locked by another process; left for later") < said.index(f"{done.name}: completed")
    assert said.index(f"{done.name}: completed") < said.index("waiting for sft-") < said.rindex(": completed")
    assert ": skipped" not in said
    assert {run.name.split("-")[0]: run.status["state"] for run in runs_of(tmp_path, "main")} == {
        "base": "completed", "sft": "completed", "rft": "completed",
    }  # fmt: skip
    there = adapters(sweep)
    assert adapters(tmp_path) == {method: there[method] for method in ("sft", "rft")}


def test_two_sweeps_at_once_train_each_run_once(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "rollouts", tmp_path / "rollouts")
    line = command(tmp_path, "-m", "method=sft,rft,dft", FEW, "logger=none")
    with start(*line) as first:
        _until(lambda: list(tmp_path.glob("main/sft-*/status.json")))
        second = script(*line)
        assert first.wait() == 0, first.stderr
        both = first.stdout + second.stdout
    there = adapters(sweep)
    assert adapters(tmp_path) == {method: there[method] for method in ("sft", "rft", "dft")}
    assert both.count(": completed") == both.count(": skipped") == 3
    assert re.search(r"locked by .*; left for later", second.stdout)


def test_evaluate_scores_unlocked_runs_first(sweep: Path) -> None:
    arguments = ("benchmark=arithmetic_long", "benchmark.arithmetic_long.eval_size=4", "evaluation.max_tokens=8")
    [held] = sweep.glob("main/dft-*")
    with start("evaluate.py", *arguments, f"output_dir={sweep}") as process:
        with FileLock(_lock(sweep, sweep, "dft")):
            _until(lambda: len(list(sweep.glob("main/*/eval/arithmetic_long*.parquet"))) == 6)
        assert process.wait() == 0, process.stderr
        assert f"{held.name}: locked by another process; postponed" in process.stdout
    files = list(sweep.glob("main/*/eval/arithmetic_long*.parquet"))
    assert len(files) == 7
    for file in files:
        remove_outcomes(file)
