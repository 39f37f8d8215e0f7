"""Compares the weight updates of a sweep's runs: `python analyze.py sweep=main`. See `--help`."""

from pathlib import Path

from omegaconf import DictConfig

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """What this script does."""
    from losslens.analysis.pipeline import analyze_job
    from losslens.config.analysis import AnalyzeConfig
    from losslens.config.parse import parse
    from losslens.report.figures.write import write_figures
    from losslens.report.page import write_report
    from losslens.report.paper_tables import write_tables
    from losslens.tracking.analysis import log_analysis

    def job(config: DictConfig) -> None:
        folder = analyze_job(config, write_report, write_figures, write_tables)
        print(folder / "report.html", flush=True)
        log_analysis(parse(AnalyzeConfig, config).logger, folder, Path(config.output_dir))

    return job, lambda: 0


if __name__ == "__main__":
    run(__file__, load)
