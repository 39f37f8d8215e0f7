"""`losslens evaluate`, `python evaluate.py`: scores finished runs once more."""

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """Imports the job's function when the first job starts."""
    from losslens.evaluation.score import evaluate_job

    return evaluate_job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
