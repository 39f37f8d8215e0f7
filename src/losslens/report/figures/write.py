"""Writes every figure for which the tables of an analysis have values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure

from losslens.core.files import atomic_folder
from losslens.report.figures import accuracies, angles, connectivity, cosines, learning_rate, norms
from losslens.report.figures.canvas import style, write
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder

_FIGURES: tuple[tuple[str, Callable[[AnalysisFolder, LossComparison], Figure | None]], ...] = (
    ("cosines", cosines.draw), ("accuracies", accuracies.draw), ("norms", norms.draw), ("angles", angles.draw),
    ("connectivity", connectivity.draw), ("learning_rate", learning_rate.draw),
)  # fmt: skip


def draw_figures(analysis: AnalysisFolder, names: Iterable[str] | None = None) -> dict[str, Figure]:
    """The figures that the tables have numbers for, by their names.

    Args:
        analysis: The tables.
        names: Of those to draw; all by default.

    Raises:
        InputError: A table is none.
    """
    comparison = LossComparison(analysis)
    with style():
        drawn = {name: draw(analysis, comparison) for name, draw in _FIGURES if names is None or name in names}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def write_figures(folder: Path) -> list[Path]:
    """Writes `figures/<name>.pdf` and `.png` into the folder of an analysis, replacing older figures.

    Raises:
        InputError: The analysis has no manifest, or a table cannot be read.
    """
    analysis = AnalysisFolder(folder)
    names = []
    _ = analysis.manifest  # raises for an interrupted analysis
    with atomic_folder(folder / "figures") as temporary, style():
        for name, drawn in draw_figures(analysis).items():
            names += [file.name for file in write(drawn, temporary, name)]
    return [folder / "figures" / name for name in names]
