"""Compares the weight updates of a sweep's runs: `python analyze.py sweep=main`. See `--help`."""

from losslens.analysis import analyze_job
from losslens.cli import run

if __name__ == "__main__":
    run(__file__, analyze_job)
