"""Samples, verifies and freezes rollouts: `python rollout.py`. See `--help`."""

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """What this script does."""
    from losslens.rollouts.sample import rollout_job

    return rollout_job, lambda: 0


if __name__ == "__main__":
    run(__file__, load)
