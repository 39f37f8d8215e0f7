"""Makes the study "How much of it is the loss?": `make study`, or one stage of it, `make study STAGE=results`.

Stages: runs (trains what is missing: about twelve hours on two cores, resumable), results (measures the runs and writes
parquet files beside the page: about two hours), figures (makes numbers, tables and figures of these: half a minute).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

from losslens.analysis.manifests import RunFacts
from losslens.core.errors import InputError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "studies" / "how_much_is_the_loss"

# Sweeps in the order in which they are made, with hours on two cores.
SWEEPS = {
    "study": 2.5, "study_rates": 0.9, "study_one_rate": 0.1, "study_epochs": 0.2, "study_full": 0.4,
    "study_smollm2": 8.0,
}  # fmt: skip
# Sweeps whose updates are compared with copies of themselves.
WITH_GEOMETRY = ("study", "study_full")


def train(sweeps: list[str], workers: int) -> None:
    """Trains the runs that are missing."""
    hours = sum(SWEEPS[sweep] for sweep in sweeps)
    print(f"runs: {', '.join(sweeps)}, {hours:.1f} hours on two cores from nothing; finished runs are kept", flush=True)
    for sweep in sweeps:
        command = [sys.executable, "train.py", f"experiment={sweep}", f"workers={workers}", "logger=none"]
        print(" ".join(command[1:]), flush=True)
        # 1: a run diverged, which is a result; it is named in what the results leave out.
        if (status := subprocess.run(command, cwd=ROOT, check=False).returncode) not in (0, 1):
            sys.exit(status)


def is_conventional(run: RunFacts) -> bool:
    """True for a run of a grid of rates at the conventional rate of its loss."""
    return math.isclose(run.config.lr.factor or 0, run.conventional_lr_scale)


def is_unseen_at_one_rate(run: RunFacts) -> bool:
    """True for a run of the six losses at one rate from the start that suggested nothing."""
    from tools.study.findings import LOSSES
    from tools.study.page import SEEN

    is_at_one_rate = run.config.lr.name == ("matched" if run.method == "dpo" else "conventional")
    return run.method in LOSSES and is_at_one_rate and str(run.config.init_seed) != SEEN["start"]


def measure(sweeps: list[str]) -> None:
    """Measures the finished runs; results of runs that are not on this machine are kept."""
    from tools.study.results import Results
    from tools.study.results import measure as measure_sweep

    # 27 minutes for 240 runs of `study` and 120 gradients, measured beside other work.
    hours = sum(SWEEPS[sweep] for sweep in sweeps) / 5
    print(f"results: {', '.join(sweeps)}, {hours:.1f} hours; passes, gradients and scores are kept", flush=True)
    for sweep in sweeps:
        print(f"results: {sweep}", flush=True)
        if sweep == "study_one_rate":
            measured = measure_sweep(["study", sweep], ROOT / "outputs", keep=is_unseen_at_one_rate)
        else:
            measured = measure_sweep([sweep], ROOT / "outputs", with_geometry=sweep in WITH_GEOMETRY)
        if (RESULTS / sweep).is_dir():
            measured = measured.with_earlier(Results.read(RESULTS, sweep))
        measured.write(RESULTS, sweep)
        if sweep == "study_rates":
            at_end = measure_sweep([sweep], ROOT / "outputs", keep=is_conventional, equal_kl=True)
            at_end.write(RESULTS, f"{sweep}-conventional")
            at_norm = measure_sweep([sweep], ROOT / "outputs", keep=is_conventional, at="norm")
            at_norm.write(RESULTS, f"{sweep}-norm")


def main() -> None:
    """Runs the stages of the command line."""
    from tools.reference import rewrite
    from tools.study.page import make

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", "runs", "results", "figures"), default="all")
    parser.add_argument("--sweep", choices=tuple(SWEEPS), action="append", help="only this sweep; may be given again")
    parser.add_argument("--workers", type=int, default=2, help="runs at once")
    arguments = parser.parse_args()
    sweeps = arguments.sweep or list(SWEEPS)
    if arguments.stage in ("all", "runs"):
        train(sweeps, arguments.workers)
    if arguments.stage in ("all", "results"):
        measure(sweeps)
    if arguments.stage in ("all", "figures"):
        make(RESULTS)
        rewrite(RESULTS.with_suffix(".md"))
        print(RESULTS)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"study: {error}", file=sys.stderr)
        sys.exit(2)
