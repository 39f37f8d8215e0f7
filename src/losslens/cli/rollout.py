"""`losslens rollout`, `python rollout.py`: samples, verifies and freezes rollouts."""

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """Imports the job's function when the first job starts."""
    from losslens.rollouts.sample import rollout_job

    return rollout_job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
