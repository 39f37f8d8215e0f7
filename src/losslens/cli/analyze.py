"""`losslens analyze`, `python analyze.py`: compares the weight updates of a sweep's runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from losslens.cli.app import run
from losslens.core.jobs import Tasks

if TYPE_CHECKING:
    from losslens.scheduling.local.devices import Device


def load(devices: Sequence[Device] = ()) -> Tasks:
    """Imports the job's function when the first job starts.

    Args:
        devices: Devices to share forward passes out to; none: all in this process.
    """
    from losslens.analysis.pipeline import analyze_job
    from losslens.cli.adapter_places import published_adapters
    from losslens.config.analysis import AnalyzeConfig
    from losslens.config.parse import parse
    from losslens.pipeline.initial_gradients import initial_gradients
    from losslens.pipeline.parallel_passes import sharing
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
        with sharing(devices) as share:
            folder = analyze_job(config, *writers, find_gradients=initial_gradients, share=share)
        print(folder / "report.html", flush=True)
        log_analysis(parse(AnalyzeConfig, config).logger, folder, Path(config.output_dir))

    return job, lambda: 0


def main(script: str = __file__) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script.
    """
    run(script, load)
