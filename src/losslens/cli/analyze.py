"""`losslens analyze`, `python analyze.py`: compares the weight updates of a sweep's runs."""

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from losslens.cli.app import run
from losslens.core.jobs import Tasks


def load() -> Tasks:
    """Imports the job's function when the first job starts."""
    from losslens.analysis.pipeline import analyze_job
    from losslens.cli.adapter_places import published_adapters
    from losslens.config.analysis import AnalyzeConfig
    from losslens.config.parse import parse
    from losslens.pipeline.initial_gradients import initial_gradients
    from losslens.report.figures.write import write_figures
    from losslens.report.page import write_report
    from losslens.report.paper_tables import write_tables
    from losslens.report.published import write_published
    from losslens.tracking.analysis import log_analysis

    def job(config: DictConfig) -> None:
        writers: list[Callable[[Path], object]] = [write_report, write_figures, write_tables]
        if (place := parse(AnalyzeConfig, config).published) is not None:
            found = {name: str(folder) for name, folder in published_adapters(place).items()}
            config = config.copy()
            OmegaConf.update(config, "adapters", found | dict(config.adapters or {}), force_add=True)
            writers.insert(0, write_published)
        folder = analyze_job(config, *writers, find_gradients=initial_gradients)
        print(folder / "report.html", flush=True)
        log_analysis(parse(AnalyzeConfig, config).logger, folder, Path(config.output_dir))

    return job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
