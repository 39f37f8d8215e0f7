"""The trajectories: size and direction of each update at its snapshots."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.report import step_curves
from losslens.report.components import Figure, Section, downloadable
from losslens.report.legends import legend
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import MUTED

_NUMBERS = ("step", "norm", "cosine_to_end", "cosine_to_sft", "overlap_to_end", "overlap_to_repeat")
_TEXTS = ("run", "diverged")
_PLOTS = (
    ("norm", "Size", "‖ΔW‖"),
    ("cosine_to_end", "Direction, relative to the run's own end", "cosine to its own end"),
    ("cosine_to_sft", "Direction, relative to SFT's end", "cosine to SFT's end"),
    ("overlap_to_end", "Main outputs, relative to the run's own end", "overlap with its own end"),
    ("overlap_to_repeat", "Main outputs, relative to the end of a repeat", "overlap with another order's end"),
)


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without trajectories."""
    table = analysis.table("trajectories", _TEXTS, _NUMBERS)
    if table.empty:
        return None
    comparison = LossComparison(analysis)
    table = step_curves.by_loss(table, comparison).assign(lost=table["diverged"] == "True")
    names = {loss.arm: loss.name for loss in comparison.losses}
    losses = table.drop_duplicates("loss_of")
    shown = [(row.loss_of, row.method_of, names.get(row.loss_of, row.loss_of)) for row in losses.itertuples()]
    return Section(
        "trajectories",
        "Trajectories",
        text=[f"The update of each run at its snapshots.{step_curves.spread(table)}{_lost(table)}"],
        key=legend(shown, comparison.looks, lines=True),
        figures=[
            Figure(title, "", _plot(table, comparison, name, axis))
            for name, title, axis in _PLOTS
            if table[name].notna().any()
        ],
        tables=[downloadable(analysis, "trajectories")],
    )


def _lost(table: pd.DataFrame) -> str:
    diverged = table.loc[table["lost"], "run"].nunique()
    if not diverged:
        return ""
    which = "run diverged and has its own line" if diverged == 1 else "runs diverged and have their own lines"
    return f" {diverged} {which}, marked ✕."


def _plot(table: pd.DataFrame, comparison: LossComparison, name: str, axis: str) -> go.Figure:
    plot = step_curves.plot(table, comparison, name, axis, log=name == "norm", lost="lost")
    if name != "norm" and table[name].min() < 0:
        plot.add_hline(y=0, line={"color": MUTED, "width": 1})
    return plot
