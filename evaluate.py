"""Scores finished runs once more: `python evaluate.py sweep=main benchmark=arithmetic_long`. See `--help`."""

from losslens.cli import run
from losslens.scoring import evaluate_job

if __name__ == "__main__":
    run(__file__, evaluate_job)
