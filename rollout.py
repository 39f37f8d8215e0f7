"""Samples, verifies and freezes rollouts: `python rollout.py`. See `--help`."""

from losslens.cli import run
from losslens.rollouts.sampling import rollout_job

if __name__ == "__main__":
    run(__file__, rollout_job)
