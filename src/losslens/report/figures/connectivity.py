"""Figure of the loss on the straight path from the reference's update to each other update."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from losslens.report.figures.canvas import COLUMN, INK, figure, key, legend_above, line_of, lines, upright
from losslens.report.loss_comparison import ComparedLoss, LossComparison
from losslens.tables.analysis_folder import AnalysisFolder


def draw(analysis: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    """Draws the figure; None if no path from the reference was measured."""
    curves = analysis.table("connectivity", ("run_a", "run_b"), ("alpha", "loss"))
    reference = comparison.reference
    if reference is None or curves.empty:
        return None
    first = analysis.manifest.get("reference")
    by_loss = {loss: _from(reference, first, comparison.between(loss, reference), curves) for loss in comparison.others}
    by_loss = {loss: along for loss, along in by_loss.items() if len(along)}
    if not by_loss:
        return None
    drawn = figure(COLUMN, 2.4)
    axes = drawn.add_subplot()
    # Without intervals: they come from the same sequences, so they overlap even for clearly different curves.
    for loss, along in by_loss.items():
        axes.plot(along.index, along, **line_of(loss, comparison.looks, len(along)))
    handles = key(list(by_loss), comparison.looks)
    own = _from(reference, first, comparison.between(reference, reference), curves)
    if len(own):
        handles += axes.plot(own.index, own, color=INK, linestyle="--", label=f"{reference.name}, repeat")
    axes.set_xlim(0, 1)
    axes.set_xlabel(lines(f"α, from {reference.name} (0) to the other (1)", 2.4))
    axes.set_ylabel("loss (nats per token)")
    upright(axes)
    legend_above(drawn, handles)
    return drawn


def _from(reference: ComparedLoss, first: str | None, pairs: pd.DataFrame, curves: pd.DataFrame) -> pd.Series:
    """Averages the curves of these pairs, by α from the reference (or, for its repeats, from the run `first`)."""
    rows = curves.merge(pairs[["run_a", "run_b"]], on=["run_a", "run_b"])
    forward = (rows["run_a"] == first) | (rows["run_a"].isin(reference.runs) & (rows["run_b"] != first))
    alpha = rows["alpha"].where(forward, 1 - rows["alpha"]).round(6)
    return rows.assign(alpha=alpha).groupby("alpha")["loss"].mean()
