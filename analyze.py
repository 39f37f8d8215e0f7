"""Compares the weight updates of a sweep's runs: `python analyze.py sweep=main`. See `--help`."""

from losslens.cli import Tasks, run


def load() -> Tasks:
    """What this script does."""
    from losslens.analysis.job import analyze_job

    return analyze_job, lambda: 0


if __name__ == "__main__":
    run(__file__, load)
