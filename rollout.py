"""Samples, verifies and freezes rollouts: `python rollout.py`. See `--help`."""

from losslens.cli.rollout import load, main

__all__ = ["load"]  # which a job on Slurm asks this file for

if __name__ == "__main__":
    main(__file__)
