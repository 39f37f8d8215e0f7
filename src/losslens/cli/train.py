"""`losslens train`, `python train.py`: trains one run per job."""

from __future__ import annotations

from collections.abc import Sequence
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
    from losslens.pipeline.sweep import SweepJobs

    sweep = SweepJobs(devices)
    return sweep.job, sweep.end


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
