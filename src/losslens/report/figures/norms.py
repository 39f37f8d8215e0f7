"""Figure of the norm of each loss's update by layer, and of its singular values."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from losslens.report.figures.canvas import COLUMN, figure, key, legend_above, line_of, logarithmic, upright
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder

_MOST_VALUES = 64


def draw(analysis: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    """Draws the figure; None without the table of runs and modules."""
    columns = ["run", "layer", "norm", "singular_values"]
    parquet = analysis.parquet("run_modules", columns)
    if set(parquet.column_names) != set(columns):
        return None
    table = parquet.to_pandas()
    table = table[table["norm"] > 0]
    losses = [loss for loss in comparison.losses if table["run"].isin(loss.runs).any()]
    if not losses:
        return None
    drawn = figure(COLUMN, 3.7)
    by_layer, by_number = drawn.subplots(2, 1)
    for loss in losses:
        rows = table[table["run"].isin(loss.runs)]
        # Squared norms are summed over the modules of a layer; norms are averaged over runs.
        squared = rows.assign(squared=rows["norm"] ** 2).groupby(["run", "layer"])["squared"].sum()
        norms = np.sqrt(squared).groupby("layer").mean()
        by_layer.plot(norms.index, norms.to_numpy(), **line_of(loss, comparison.looks, len(norms)))
        values = _spectrum(rows)
        by_number.plot(range(1, len(values) + 1), values, **line_of(loss, comparison.looks, len(values)))
    for axes in (by_layer, by_number):
        logarithmic(axes, "y", [value for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float)])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        upright(axes)
    by_layer.set_xlabel("layer")
    by_layer.set_ylabel("‖ΔW‖ of the layer")
    by_number.set_xlabel("index of the singular value")
    by_number.set_ylabel("σ of ΔW (mean)")
    legend_above(drawn, key(losses, comparison.looks))
    return drawn


def _spectrum(rows: pd.DataFrame) -> np.ndarray:
    """Averages the k-th singular value over modules and runs; missing ones count as 0."""
    lists = [np.asarray(values, dtype=float) for values in rows["singular_values"]]
    longest = min(max((len(values) for values in lists), default=0), _MOST_VALUES)
    padded = np.zeros((len(lists), longest))
    for values, row in zip(lists, padded, strict=True):
        kept = values[:longest]
        row[: len(kept)] = kept
    return padded.mean(axis=0) if lists else np.zeros(0)
