"""Writes every figure for which the tables of an analysis have values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from losslens.core.files import atomic_folder
from losslens.report.figures import accuracies, angles, connectivity, cosines, learning_rate, norms
from losslens.report.figures.canvas import style, write
from losslens.report.loss_comparison import Comparison
from losslens.tables.analysis_folder import AnalysisFolder

_FIGURES: tuple[tuple[str, Callable[[AnalysisFolder, Comparison], Figure | None]], ...] = (
    ("cosines", cosines.draw), ("accuracies", accuracies.draw), ("norms", norms.draw), ("angles", angles.draw),
    ("connectivity", connectivity.draw), ("learning_rate", learning_rate.draw),
)  # fmt: skip


def write_figures(folder: Path) -> list[Path]:
    """Writes `figures/<name>.pdf` and `.png` into the folder of an analysis, replacing older figures.

    Raises:
        InputError: The analysis has no manifest, or a table cannot be read.
    """
    analysis = AnalysisFolder(folder)
    comparison = Comparison(analysis)
    names = []
    _ = analysis.manifest  # raises for an interrupted analysis
    with atomic_folder(folder / "figures") as temporary, style():
        for name, draw in _FIGURES:
            drawn = draw(analysis, comparison)
            if drawn is not None:
                names += [file.name for file in write(drawn, temporary, name)]
    return [folder / "figures" / name for name in names]
