"""`losslens train`, `python train.py`: trains one run per job."""

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """Imports the job's function when the first job starts."""
    from losslens.pipeline.sweep import SweepJobs

    sweep = SweepJobs()
    return sweep.job, sweep.end


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
