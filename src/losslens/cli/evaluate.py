"""`losslens evaluate`, `python evaluate.py`: scores finished runs once more."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from losslens.cli.app import run
from losslens.core.jobs import Tasks

if TYPE_CHECKING:
    from losslens.scheduling.local.devices import Device


def load(devices: Sequence[Device] = ()) -> Tasks:
    """Imports the job's function when the first job starts.

    Args:
        devices: Devices to share the runs out to; none: one run after the other in this process.
    """
    if devices:
        from losslens.pipeline.parallel_scores import evaluate_in_parallel

        return partial(evaluate_in_parallel, devices=devices), lambda: 0
    from losslens.pipeline.evaluate_job import evaluate_job

    return evaluate_job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
