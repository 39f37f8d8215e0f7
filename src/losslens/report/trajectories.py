"""The trajectories: how each run got where it is."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.report import course
from losslens.report.comparison import Comparison
from losslens.report.folder import AnalysisFolder
from losslens.report.keys import key
from losslens.report.names import of_loss
from losslens.report.parts import Figure, Section, downloadable
from losslens.report.style import MUTED

_NUMBERS = ("learning_rate", "step", "norm", "cosine_to_end", "cosine_to_sft")
_TEXTS = ("run", "method", "lr", "settings", "diverged")
_PLOTS = (
    ("norm", "Size", "‖ΔW‖"),
    ("cosine_to_end", "Direction, to the run's own end", "cosine to its own end"),
    ("cosine_to_sft", "Direction, to SFT's end", "cosine to SFT's end"),
)


def section(analysis: AnalysisFolder) -> Section | None:
    """The section; None without trajectories."""
    table = analysis.table("trajectories", _TEXTS, _NUMBERS)
    if table.empty:
        return None
    comparison = Comparison(analysis)
    table = _by_loss(table, comparison).assign(lost=table["diverged"] == "True")
    losses = table.drop_duplicates("loss_of")
    called = {loss.arm: loss.name for loss in comparison.losses}
    shown = [
        (row.loss_of, row.method, called.get(row.loss_of) or of_loss(row.method, row.learning_rate, row.settings))
        for row in losses.itertuples()
    ]
    return Section(
        "trajectories",
        "Trajectories",
        text=[f"At the steps that were kept.{course.spread(table)}{_lost(table)}"],
        key=key(shown, comparison.looks, lines=True),
        figures=[
            Figure(title, "", _plot(table, comparison, name, axis))
            for name, title, axis in _PLOTS
            if table[name].notna().any()
        ],
        tables=[downloadable(analysis, "trajectories")],
    )


def _by_loss(table: pd.DataFrame, comparison: Comparison) -> pd.DataFrame:
    """The rows with their losses; those whose run is in no table of runs by what they say themselves."""
    table = course.by_loss(table, comparison)
    own = table["method"] + "-" + table["lr"] + (" " + table["settings"]).where(table["settings"] != "", "")
    known = table["run"].isin(comparison.arms.keys())
    return table.assign(loss_of=table["loss_of"].where(known, own), method_of=table["method"])


def _lost(table: pd.DataFrame) -> str:
    diverged = table.loc[table["lost"], "run"].nunique()
    verb = "s and is a line of its own" if diverged == 1 else " and are lines of their own"
    return f" {diverged} diverge{verb}, marked ✕." if diverged else ""


def _plot(table: pd.DataFrame, comparison: Comparison, name: str, axis: str) -> go.Figure:
    plot = course.plot(table, comparison, name, axis, log=name == "norm", lost="lost")
    if name != "norm" and table[name].min() < 0:
        plot.add_hline(y=0, line={"color": MUTED, "width": 1})
    return plot
