"""`losslens analyze`, `python analyze.py`: compares the weight updates of a sweep's runs."""

from pathlib import Path

from omegaconf import DictConfig

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """Imports the job's function when the first job starts."""
    from losslens.analysis.pipeline import analyze_job
    from losslens.config.analysis import AnalyzeConfig
    from losslens.config.parse import parse
    from losslens.pipeline.initial_gradients import initial_gradients
    from losslens.report.figures.write import write_figures
    from losslens.report.page import write_report
    from losslens.report.paper_tables import write_tables
    from losslens.tracking.analysis import log_analysis

    def job(config: DictConfig) -> None:
        folder = analyze_job(config, write_report, write_figures, write_tables, find_gradients=initial_gradients)
        print(folder / "report.html", flush=True)
        log_analysis(parse(AnalyzeConfig, config).logger, folder, Path(config.output_dir))

    return job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
