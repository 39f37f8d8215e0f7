"""Compares the weight updates of a sweep's runs: `python analyze.py sweep=main`. See `--help`."""

from losslens.cli.analyze import load, main

__all__ = ["load"]  # which a job on Slurm asks this file for

if __name__ == "__main__":
    main(__file__)
