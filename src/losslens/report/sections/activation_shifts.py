"""Activation shifts: whether two losses move the hidden states in the same directions, by layer and position."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.report.components import Figure, Section, downloadable
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import number, whole
from losslens.tables.style import MUTED, escape_markup, figure

_TEXTS = ("run_a", "run_b", "position")
_NUMBERS = ("layer", "shift_cosine", "shift_cosine_null")
_TITLES = {
    "prompt": "Last token of the prompt", "start": "First tokens of the completion", "completion": "Whole completion",
}  # fmt: skip


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without pairs of the reference loss and another."""
    comparison = LossComparison(analysis)
    table = analysis.table("shifts", _TEXTS, _NUMBERS).dropna(subset=["shift_cosine"])
    reference = comparison.reference
    if table.empty or reference is None:
        return None
    against = _against(table, comparison)
    if against.empty:
        return None
    text = (
        f"How far each loss moves the hidden states in the direction in which {reference.name} moves them: the cosine "
        "of the two shifts from the base, by layer and position; means over pairs of runs. Grey: the 95% bound of its "
        "absolute value for rotated copies with the runs' KL, the largest of these losses."
    )
    return Section(
        "shifts",
        "Activation shifts",
        text=[text],
        key=legend_of(comparison, against["loss"], lines=True),
        figures=[
            Figure(_TITLES.get(position, position), "", _plot(rows, comparison, reference.name))
            for position, rows in against.groupby("position", sort=False)
        ],
        tables=[downloadable(analysis, "shifts")],
    )


def _against(table: pd.DataFrame, comparison: LossComparison) -> pd.DataFrame:
    """Returns the means over the pairs by which each loss is compared with the reference: `loss` is its arm."""
    assert comparison.reference is not None
    keyed = table.set_index(["run_a", "run_b"])
    parts = []
    for loss in comparison.others:
        between = comparison.between(comparison.reference, loss)
        pairs = keyed.index.intersection(pd.MultiIndex.from_frame(between[["run_a", "run_b"]]))
        means = keyed.loc[pairs].groupby(["position", "layer"], sort=False).mean().reset_index()
        parts.append(means.assign(loss=loss.arm))
    return pd.concat(parts) if parts else pd.DataFrame(columns=["loss"])


def _plot(rows: pd.DataFrame, comparison: LossComparison, reference: str) -> go.Figure:
    drawn = figure("layer", f"cosine to {escape_markup(reference)}'s shift", height=320)
    names = {loss.arm: (loss.name, loss.method) for loss in comparison.losses}
    null = rows.groupby("layer")["shift_cosine_null"].max().dropna()
    if len(null):
        drawn.add_scatter(
            x=[*null.index, *null.index[::-1]], y=[*null, *-null[::-1]], mode="lines", line={"width": 0},
            fill="toself", fillcolor="rgba(128,128,128,0.15)", hoverinfo="skip",
        )  # fmt: skip
    drawn.add_hline(y=0, line={"color": MUTED, "width": 1})
    for arm, own in rows.groupby("loss", sort=False):
        name, method = names[arm]
        look = comparison.looks.of(arm, method)
        drawn.add_scatter(
            x=own["layer"], y=own["shift_cosine"].round(4), mode="lines+markers", meta=arm, hoverinfo="text",
            line={"color": look.colour, "width": 2, "dash": look.dash},
            marker={"symbol": look.symbol, "color": look.colour, "size": 8},
            hovertext=[
                f"<b>{escape_markup(name)}</b><br>layer {whole(row.layer)}: {number(row.shift_cosine)}"
                for row in own.itertuples()
            ],
        )  # fmt: skip
    drawn.update_yaxes(range=[-1.05, 1.05])
    return drawn
