"""Scores finished runs once more: `python evaluate.py sweep=main benchmark=arithmetic_long`. See `--help`."""

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """What this script does."""
    from losslens.evaluation.score import evaluate_job

    return evaluate_job, lambda: 0


if __name__ == "__main__":
    run(__file__, load)
