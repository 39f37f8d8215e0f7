"""Figure of the learning-rate-matched comparison: size, direction and accuracy of each arm."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from losslens.report.arm_comparison import arm_rows, base_on, is_matched
from losslens.report.figures.canvas import (
    COLUMN,
    INK,
    MUTED,
    SHADE,
    figure,
    legend_above,
    logarithmic,
    point_of,
    upright,
)
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import colour


def draw(analysis: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    """Draws the figure; None if no method was trained at several learning rates."""
    arms = arm_rows(analysis)
    if not is_matched(arms):
        return None
    arms = arms[arms["norm"].gt(0)]
    if not arms["cosine_to_sft"].notna().any():
        return None
    scored = arms["accuracy"].notna().any()
    drawn = figure(COLUMN, (3.6 if scored else 2.2) + 0.3)
    panels = drawn.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    _directions(panels[0], arms)
    if scored:
        _accuracies(panels[1], analysis, arms)
    columns = ["cosine_to_sft", "accuracy"]
    for axes, column in zip(panels, columns, strict=False):
        for _, own in arms.groupby(["method", "settings"]):  # one method at its rates
            own = own.sort_values("norm")
            axes.plot(own["norm"], own[column], color=colour(own["method"].iloc[0]), linewidth=0.7, alpha=0.7)
        for _, arm in arms.iterrows():
            ends = [abs(arm[f"{column}_{end}"] - arm[column]) for end in ("min", "max")]
            axes.errorbar(
                arm["norm"], arm[column], yerr=None if any(map(pd.isna, ends)) else [[ends[0]], [ends[1]]],
                linestyle="", elinewidth=0.9,
                **point_of(arm["arm"], arm["method"], comparison.looks),
            )  # fmt: skip
        upright(axes)
    logarithmic(panels[-1], "x", arms["norm"])
    panels[-1].set_xlabel("‖ΔW‖")
    handles = [
        Line2D([], [], linestyle="", label=arm["beside"], **point_of(arm["arm"], arm["method"], comparison.looks))
        for _, arm in arms.iterrows()
    ]
    legend_above(drawn, handles)
    return drawn


def _directions(axes: Axes, arms: pd.DataFrame) -> None:
    axes.axhline(0, color=MUTED, linewidth=0.6)
    null = arms["cosine_to_sft_null"].max()
    if not pd.isna(null):
        axes.axhspan(-null, null, color=SHADE, linewidth=0, zorder=0)
    repeats = arms.loc[arms["arm"] == arms["sft"], "cosine_repeat"].dropna()
    for value in repeats:
        axes.axhline(value, color=INK, linewidth=0.9, linestyle="--")
        axes.annotate(
            "SFT, repeat", (0.5, value), xycoords=("axes fraction", "data"), xytext=(0, -2),
            textcoords="offset points", va="top", ha="center", fontsize=7,
        )  # fmt: skip
    axes.set_ylabel("cosine to SFT")


def _accuracies(axes: Axes, analysis: AnalysisFolder, arms: pd.DataFrame) -> None:
    for _, row in base_on(analysis, arms["benchmark"]).head(1).iterrows():
        axes.axhspan(row["ci_low"], row["ci_high"], color=SHADE, alpha=0.5, linewidth=0, zorder=0)
        axes.axhline(row["accuracy"], color=INK, linewidth=0.9, linestyle=":")
        axes.annotate(
            "base", (0.5, row["accuracy"]), xycoords=("axes fraction", "data"), xytext=(0, 1),
            textcoords="offset points", va="bottom", ha="center", fontsize=7,
        )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylabel("accuracy")
