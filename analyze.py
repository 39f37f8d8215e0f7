"""Compares the weight updates of a sweep's runs: `python analyze.py sweep=main`. See `--help`."""

from omegaconf import DictConfig

from losslens.cli import Tasks, run


def load() -> Tasks:
    """What this script does."""
    from losslens.analysis.job import analyze_job
    from losslens.report.page import write_report

    def job(config: DictConfig) -> None:
        print(write_report(analyze_job(config)))

    return job, lambda: 0


if __name__ == "__main__":
    run(__file__, load)
