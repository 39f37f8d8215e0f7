"""Offline W&B runs sent per second by `launch/wandb_sync.py` and W&B's own `wandb sync`, sequentially and in parallel.

    python benchmarks/wandb_sync.py
    python benchmarks/wandb_sync.py --runs 20

Uses the local server of the tests, once without delay and once with 50 ms of latency per request, as for a remote
server. Times are those of whole commands; after each command all runs are checked to have arrived.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import wandb

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from wandb_server import WandbServer, serving  # noqa: E402

STEPS, METRICS = 50, 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder, serving() as server:
        made = Path(folder) / "made"
        make(made / "main", runs)
        print(f"{runs} offline runs of {STEPS} steps with {METRICS} metrics")
        for delay in (0.0, 0.05):
            print(f"  server latency: {'50 ms' if delay else 'none'}")
            for title, command in (
                ("wandb sync -n 1", ["wandb", "sync", "-n", "1"]),
                ("wandb sync (5 at a time)", ["wandb", "sync"]),
                ("launch/wandb_sync.py parallel=1", ["parallel=1"]),
                ("launch/wandb_sync.py (8 at a time)", []),
                ("launch/wandb_sync.py parallel=32", ["parallel=32"]),
            ):
                duration = seconds(server, made, Path(folder) / "sent", delay, command, runs)
                print(f"    {title:36}{duration:6.1f} s  {runs / duration:5.1f} runs per second", flush=True)


def make(sweep: Path, runs: int) -> None:
    settings = wandb.Settings(silent=True, console="off", x_disable_machine_info=True, x_save_requirements=False)
    for number in range(runs):
        folder = sweep / f"run-{number}"
        folder.mkdir(parents=True)
        with wandb.init(project="bench", group="main", dir=folder, mode="offline", settings=settings) as run:
            for step in range(STEPS):
                run.log({f"train/metric-{metric}": step / (metric + 1) for metric in range(METRICS)}, step=step)
    wandb.teardown()


def seconds(server: WandbServer, made: Path, copy: Path, delay: float, command: list[str], runs: int) -> float:
    """Sends a fresh copy of the runs; exits if not all of them arrive."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(made, copy, symlinks=True)
    if command[:1] == ["wandb"]:
        command = [*command, *map(str, copy.glob("main/*/wandb/offline-run-*"))]
    else:
        command = [sys.executable, "launch/wandb_sync.py", f"output_dir={copy}", *command]
    server.reset()
    server.fail({"delay": delay})
    environment = {**os.environ, **server.environment, "WANDB_DIR": str(copy)}  # for the logs of `wandb sync`
    started = time.monotonic()
    subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    duration = time.monotonic() - started
    arrived = [run for run in server.seen()["runs"].values() if len(run["history"]) == STEPS and not run["repeated"]]
    if len(arrived) != runs:
        sys.exit(f"wandb_sync.py: only {len(arrived)} of {runs} runs arrived")
    return duration


if __name__ == "__main__":
    main()
