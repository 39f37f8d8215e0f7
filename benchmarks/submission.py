"""Seconds to plan and submit a sweep of 1,000 runs to Slurm, beside Hydra's own submitit launcher.

    python benchmarks/submission.py
    python benchmarks/submission.py --runs 100

No Slurm is needed: sbatch and its like are scripts that only answer. Hydra's own launcher (hydra-submitit-launcher,
into a temporary folder) waits for its jobs, so it is stopped when it has called sbatch. It resumes nothing: it neither
looks at runs nor writes down which job is whose. Ours does for each of them.
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
        place = Path(folder)
        (place / "bin").mkdir()
        for name, text in COMMANDS.items():
            (place / "bin" / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
            (place / "bin" / name).chmod(0o755)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place / "stock", STOCK]
        subprocess.run(pip, check=True)
        ours = seconds(place, "ours", runs, ["hydra/launcher=slurm"], {})
        again = seconds(place, "ours", runs, ["hydra/launcher=slurm", "hydra.launcher.dry_run=true"], {})
        stock = seconds(place, "stock", runs, ["hydra/launcher=submitit_slurm"], {"PYTHONPATH": str(place / "stock")})
    print(f"{runs} runs, from the command to the last call of sbatch (ours: to the prompt)")
    print(f"  hydra/launcher=slurm            {ours:6.1f} s  {1000 * ours / runs:5.0f} ms a run")
    print(f"  the same as a dry run           {again:6.1f} s  {1000 * again / runs:5.0f} ms a run")
    print(f"  Hydra's own, submitit_slurm     {stock:6.1f} s  {1000 * stock / runs:5.0f} ms a run")


def seconds(place: Path, name: str, runs: int, arguments: list[str], environment: dict[str, str]) -> float:
    """From the start of the command to its end, or to its call of sbatch where it does not end by itself."""
    record = place / f"{name}.record"
    command = [
        sys.executable, "train.py", "-m", *arguments, f"seed=range(0,{runs})", f"output_dir={place / name}",
        "resources=cpu",
    ]  # fmt: skip
    path = f"{place / 'bin'}:{os.environ['PATH']}"
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
        sys.exit(f"submission.py: {' '.join(arguments)} ended with status {process.returncode}")
    return time.monotonic() - started


if __name__ == "__main__":
    main()
