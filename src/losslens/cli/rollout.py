"""`losslens rollout`, `python rollout.py`: samples, verifies and freezes rollouts."""

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
        devices: Devices to share the jobs out to; none: one after the other in this process.
    """
    if devices:
        from losslens.pipeline.parallel_rollouts import RolloutJobs

        jobs = RolloutJobs(devices)
        return jobs.job, jobs.end
    from losslens.rollouts.sample import rollout_job

    return rollout_job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
