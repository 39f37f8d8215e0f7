"""Figure of the angle of each loss to the reference by layer, with the reference's repeat and the null."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from losslens.report.figures.canvas import COLUMN, INK, MUTED, figure, key, legend_above, line_of, lines, upright
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder

_MEASURE = "angle_min_left"


def draw(analysis: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    """Draws the figure; None without a reference or layers."""
    layers = analysis.table("layers", ("run_a", "run_b"), ("layer", _MEASURE, f"{_MEASURE}_null"))
    layers = layers[layers[_MEASURE].notna()]
    reference = comparison.reference
    if reference is None or layers.empty:
        return None
    by_loss = {loss: _of(comparison.between(loss, reference), layers) for loss in comparison.others}
    by_loss = {loss: rows for loss, rows in by_loss.items() if len(rows)}
    if not by_loss:
        return None
    drawn = figure(COLUMN, 2.4)
    axes = drawn.add_subplot()
    for loss, rows in by_loss.items():
        mean = rows.groupby("layer")[_MEASURE].mean()
        axes.plot(mean.index, mean.to_numpy(), **line_of(loss, comparison.looks, len(mean)))
    handles = key(list(by_loss), comparison.looks)
    own = _of(comparison.between(reference, reference), layers).groupby("layer")[_MEASURE].mean()
    if len(own):
        label = f"{reference.name}, repeat"
        handles += axes.plot(own.index, own.to_numpy(), color=INK, linestyle="--", label=label)
    null = pd.concat(by_loss.values()).groupby("layer")[f"{_MEASURE}_null"].mean().dropna()
    if len(null):
        handles += axes.plot(null.index, null.to_numpy(), color=MUTED, linestyle=":", label="unrelated")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(lines(f"angle to {reference.name} (°)", 1.8))
    upright(axes)
    legend_above(drawn, handles)
    return drawn


def _of(pairs: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of `layers` of these pairs."""
    return layers.merge(pairs[["run_a", "run_b"]], on=["run_a", "run_b"])
