"""The disk space that runs need, told and checked before anything is computed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from losslens.core.errors import InputError
from losslens.core.notices import print_once
from losslens.models.loading import source_of
from losslens.models.trained_weights import require_tunable
from losslens.runs.spec import RunSpec

_BYTES = 4  # trained weights and optimiser moments are float32
# Two checkpoints are kept, and a third is there while it is written: weights, two moments, and the weights logged last.
_CHECKPOINTS, _PER_CHECKPOINT = 3, 4
_UNITS = ("B", "kB", "MB", "GB", "TB")
_OUTCOMES = 2_000  # bytes of a problem's answer and outcome, generously


@dataclass(frozen=True)
class DiskNeed:
    """Space that one run needs, bytes.

    Attributes:
        kept: For what stays: trained weights, snapshots, outcomes.
        temporary: For its checkpoints while it trains.
    """

    kept: int
    temporary: int


def disk_need(spec: RunSpec) -> DiskNeed:
    """Estimates the space that a run needs.

    Raises:
        InputError: The base cannot be trained as configured.
    """
    config = spec.config
    weights = _BYTES * require_tunable(source_of(config.model), spec.lora)
    rows = (config.data.train_size or 0) * (1 if spec.method.own_samples else config.rollouts.samples_per_prompt)
    steps = config.optim.steps(max(rows, 1))
    snapshots = 0 if config.optim.snapshot_steps is None else steps // config.optim.snapshot_steps
    answers = sum(data.eval_size or 0 for data in config.benchmarks) * (1 + config.evaluation.samples_per_prompt)
    return DiskNeed(weights * (1 + snapshots) + _OUTCOMES * answers, _CHECKPOINTS * _PER_CHECKPOINT * weights)


def require_space(spec: RunSpec, jobs: int, at_once: int = 1) -> None:
    """Checks the free space of the output folder, and prints what the jobs of the command will need.

    Args:
        spec: The run to start.
        jobs: Number of runs of the command, taken to be like this one.
        at_once: How many of them train at the same time.

    Raises:
        InputError: There is too little for the run, or for those of the command's runs that are not there yet.
    """
    need = disk_need(spec)
    done = sum(1 for _ in spec.sweep.glob("*/adapter")) + sum(1 for _ in spec.sweep.glob("*/model"))
    left = max(jobs - done, 1)
    required, free = left * need.kept + at_once * need.temporary, _free_bytes(spec.sweep)
    checkpoints = _size(at_once * need.temporary)
    if required > free:
        raise InputError(
            f"output_dir={spec.config.output_dir}: {_size(free)} are free, but {_runs(left)} may need {_size(required)}"
            f" ({checkpoints} of it for checkpoints)"
        )
    print_once(f"disk for {_runs(jobs)}: {_size(jobs * need.kept)}, and up to {checkpoints} for checkpoints")


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _free_bytes(folder: Path) -> int:
    """Free space where a folder is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(os.path.realpath(folder)).free


def _size(count: float) -> str:
    """Formats a number of bytes: `1.2 GB`."""
    power = min(max((len(str(int(count))) - 1) // 3, 1), 4)
    value = count / 1000**power
    return f"{value:.1f} {_UNITS[power]}" if value < 10 else f"{value:.0f} {_UNITS[power]}"
