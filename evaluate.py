"""Scores finished runs once more: `python evaluate.py sweep=main benchmark=arithmetic_long`. See `--help`."""

from losslens.cli.evaluate import load, main

__all__ = ["load"]  # which a job on Slurm asks this file for

if __name__ == "__main__":
    main(__file__)
