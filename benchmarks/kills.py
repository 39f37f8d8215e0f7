"""A sweep with `hydra/launcher=local`, killed at random moments, ends in the bytes of one that nobody disturbed.

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 10 --seed 3

SIGKILL goes to a worker or to the command itself, whichever the dice choose. After a kill of the command its workers
must end by themselves; then the same command line is started again. In the end the adapters are compared with those of
a sweep in one process, no process of the sweep may be left, and no run may be locked.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from losslens.core.hashing import hash_file
from losslens.runs.run import runs_of

ROOT = Path(__file__).parents[1]
SWEEP = [
    "method=sft,rft,dft,rift,grpo,dpo", "logger=none", "data.train_size=60", "data.eval_size=40",
    "rollouts.max_tokens=64", "evaluation.max_tokens=64", "optim.max_steps=60", "optim.batch_size=8",
    "optim.save_steps=5", "optim.log_steps=5",
]  # fmt: skip
_MARK = "LOSSLENS_BENCHMARK"  # in the environment of all that is started here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--longest", type=float, default=30.0, help="seconds between two kills, at most")
    asked = parser.parse_args()
    dice = random.Random(asked.seed)
    print(f"seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        started = time.monotonic()
        subprocess.run(_line(calm), cwd=ROOT, env=_environment(), check=True, stdout=subprocess.DEVNULL)
        print(f"undisturbed, in one process: {time.monotonic() - started:.0f} s", flush=True)
        line = [*_line(wild), "hydra/launcher=local", f"hydra.launcher.workers={asked.workers}"]
        _disturb(line, asked.kills, asked.longest, dice)
        started = time.monotonic()
        outcome = subprocess.run(line, cwd=ROOT, env=_environment(), check=False, capture_output=True, text=True)
        print(f"the rest: {time.monotonic() - started:.0f} s, exit status {outcome.returncode}", flush=True)
        faults = _faults(calm, wild) + ([outcome.stderr] if outcome.returncode else [])
    for fault in faults:
        print(fault)
    print("FAILED" if faults else "the same bytes; no process and no lock is left")
    sys.exit(bool(faults))


def _line(output_dir: Path) -> list[str]:
    return [sys.executable, "train.py", "-m", *SWEEP, f"output_dir={output_dir}"]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", _MARK: str(os.getpid())}


def _disturb(line: list[str], kills: int, longest: float, dice: random.Random) -> None:
    """Runs the command, again and again, until so many processes have been killed or the sweep is complete."""
    done = 0
    while done < kills:
        command = subprocess.Popen(
            line, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        parent = psutil.Process(command.pid)
        while done < kills:
            pause = dice.uniform(0, longest)
            try:
                command.wait(pause)
                break
            except subprocess.TimeoutExpired:
                pass
            workers = _workers(parent)
            victim = dice.choice([parent, *workers])
            what = "the command" if victim is parent else "a worker"
            victim.send_signal(signal.SIGKILL)
            done += 1
            print(f"kill {done}, {pause:.1f} s later: {what} of {1 + len(workers)} processes", flush=True)
            if victim is parent:
                command.wait()
                started = time.monotonic()
                psutil.wait_procs(workers, timeout=120)
                print(f"  its workers took {time.monotonic() - started:.1f} s to end", flush=True)
                break
        if command.poll() is not None and command.returncode >= 0:
            print(f"  the command has ended with status {command.returncode}", flush=True)
            if command.returncode == 0:
                return
        if done == kills and command.poll() is None:
            command.wait()


def _workers(parent: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def _faults(calm: Path, wild: Path) -> list[str]:
    faults = []
    expected, found = _adapters(calm), _adapters(wild)
    faults += [f"{name}: another adapter" for name in expected if found.get(name) != expected[name]]
    for run in runs_of(wild, "main"):
        if run.status["state"] != "completed" or run.is_locked:
            faults.append(f"{run.name}: {run.status}, locked: {run.is_locked}")
    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get(_MARK) == str(os.getpid()):
            faults.append(f"left behind: {process}")
    return faults


def _adapters(output_dir: Path) -> dict[str, str]:
    files = output_dir.glob("main/*/adapter/adapter_model.safetensors")
    return {file.parents[1].name: hash_file(file) for file in files}


if __name__ == "__main__":
    main()
