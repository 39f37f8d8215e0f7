"""Figure of the accuracies with their intervals and the untrained base."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from losslens.report.arm_comparison import arm_rows, base_on
from losslens.report.figures.canvas import COLUMN, INK, LETTER, SHADE, figure, lines, point_of, rows
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import colour


def draw(analysis: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    """Draws the figure; None if nothing was scored."""
    arms = arm_rows(analysis)
    if arms.empty or not arms["accuracy"].notna().any():
        return None
    by_arm = arms[arms["accuracy"].notna()].set_index("arm")
    losses = [loss for loss in comparison.losses if loss.arm in by_arm.index]
    if not losses:
        return None
    drawn = figure(height=0.75 + 0.2 * len(losses))
    axes = drawn.add_subplot()
    for _, row in base_on(analysis, by_arm["benchmark"]).head(1).iterrows():
        axes.axvspan(row["ci_low"], row["ci_high"], color=SHADE, alpha=0.5, linewidth=0, zorder=0)
        axes.axvline(row["accuracy"], color=INK, linewidth=0.9, linestyle=":")
        axes.annotate(
            "base", (row["accuracy"], 1), xycoords=("data", "axes fraction"), xytext=(0, 1), textcoords="offset points",
            ha="center", va="bottom", fontsize=7,
        )  # fmt: skip
    for place, loss in enumerate(losses):
        arm = by_arm.loc[loss.arm]
        ink = colour(loss.method)
        axes.plot([arm["ci_low"], arm["ci_high"]], [place, place], color=ink, linewidth=1.6, solid_capstyle="butt")
        if arm["seeds"] > 1 and not pd.isna(arm["accuracy_min"]):
            axes.plot(
                [arm["accuracy_min"], arm["accuracy_max"]],
                [place] * 2,
                "|",
                color=INK,
                markersize=6,
                markeredgewidth=0.8,
            )
        axes.plot(
            arm["accuracy"], place, linestyle="", **point_of(loss.arm, loss.method, comparison.looks)
        )  # fmt: skip
    rows(axes, [loss.name for loss in losses], list(range(len(losses))))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    room = COLUMN - LETTER * max(len(loss.name) for loss in losses) - 0.3
    axes.set_xlabel(lines(f"accuracy on {by_arm['benchmark'].iloc[0]} (95% interval)", room))
    return drawn
