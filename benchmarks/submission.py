"""Time to plan and submit a sweep of 1,000 runs to Slurm, compared with Hydra's own submitit launcher.

    python benchmarks/submission.py
    python benchmarks/submission.py --runs 100

Slurm is not needed: sbatch and the other commands are replaced by scripts. Hydra's own launcher
(hydra-submitit-launcher, installed into a temporary folder) waits for its jobs, so it is stopped after it has called
sbatch. Unlike ours, it neither checks which runs are done nor records which job belongs to which run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STOCK = "hydra-submitit-launcher==1.2.0"
COMMANDS = {
    "sbatch": '[ "$1" = --test-only ] || { echo $(date +%s.%N) >> "$RECORD"; echo "Submitted batch job 100"; }',
    "scontrol": "printf 'ClusterName = recorded\\nMaxArraySize = 1001\\n'",
    "squeue": "",
    "srun": "",
    "sacct": "exit 1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder)
        write_commands(temporary)
        target = temporary / "stock"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, STOCK]
        subprocess.run(pip, check=True)
        ours = seconds(temporary, "ours", runs, ["hydra/launcher=slurm"], {})
        dry_run = seconds(temporary, "ours", runs, ["hydra/launcher=slurm", "hydra.launcher.dry_run=true"], {})
        stock = seconds(temporary, "stock", runs, ["hydra/launcher=submitit_slurm"], {"PYTHONPATH": str(target)})
    print(f"{runs} runs, from the command to the last call of sbatch (ours: to the end of the command)")
    print(f"  hydra/launcher=slurm            {ours:6.1f} s  {1000 * ours / runs:5.0f} ms per run")
    print(f"  the same as a dry run           {dry_run:6.1f} s  {1000 * dry_run / runs:5.0f} ms per run")
    print(f"  Hydra's own, submitit_slurm     {stock:6.1f} s  {1000 * stock / runs:5.0f} ms per run")


def write_commands(temporary: Path) -> None:
    """Writes the scripts that stand for Slurm's commands."""
    (temporary / "bin").mkdir()
    for name, text in COMMANDS.items():
        (temporary / "bin" / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (temporary / "bin" / name).chmod(0o755)


def seconds(temporary: Path, name: str, runs: int, arguments: list[str], environment: dict[str, str]) -> float:
    """Time from the start of the command to its end or, for the stock launcher, to its call of sbatch."""
    record = temporary / f"{name}.record"
    command = [
        sys.executable, "train.py", "-m", *arguments, f"seed=range(0,{runs})", f"output_dir={temporary / name}",
        "resources=cpu",
    ]  # fmt: skip
    path = f"{temporary / 'bin'}:{os.environ['PATH']}"
    started, wall = time.monotonic(), time.time()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PATH": path, "RECORD": str(record), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None:
        if name == "stock" and record.exists() and record.read_text(encoding="utf-8"):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return float(record.read_text(encoding="utf-8").split()[0]) - wall
        time.sleep(0.05)
    if process.returncode != 0:
        sys.exit(f"submission.py: {' '.join(arguments)} failed with exit status {process.returncode}")
    return time.monotonic() - started


if __name__ == "__main__":
    main()
