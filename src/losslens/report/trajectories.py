"""The trajectories: how each run got where it is."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.report.arms import short
from losslens.report.folder import AnalysisFolder
from losslens.report.numbers import number, rate, whole
from losslens.report.parts import Figure, Key, Section, downloadable
from losslens.report.style import MUTED, Rates, colour, figure, in_order, logarithmic, name_of, safe, translucent

_NUMBERS = ("learning_rate", "step", "norm", "cosine_to_end", "cosine_to_sft")
_GROUP = ["method", "lr", "learning_rate", "settings", "diverged"]
_PLOTS = (
    ("norm", "Size", "‖ΔW‖ (log)"),
    ("cosine_to_end", "Direction, to the run's own end", "cosine to its own end"),
    ("cosine_to_sft", "Direction, to SFT's end", "cosine to SFT's end"),
)


def section(analysis: AnalysisFolder) -> Section | None:
    """The section; None without trajectories."""
    table = analysis.table("trajectories", ("run", "method", "lr", "settings", "diverged"), _NUMBERS)
    if table.empty:
        return None
    rates = Rates(table["learning_rate"])
    several = table.groupby([*_GROUP, "step"])["run"].nunique().max() > 1
    spread = " A line is the mean over seeds, the band goes from the smallest to the largest." if several else ""
    return Section(
        "trajectories",
        "Trajectories",
        text=[f"At the steps that were kept.{spread}{_lost(table)}"],
        key=Key(
            [(name, colour(name)) for name in in_order(table["method"])],
            [(rates.dash(value), rate(value)) for value in rates.values],
            lines=True,
        ),
        figures=[
            Figure(title, "", _plot(table, rates, name, axis))
            for name, title, axis in _PLOTS
            if table[name].notna().any()
        ],
        tables=[downloadable(analysis, "trajectories")],
    )


def _lost(table: pd.DataFrame) -> str:
    diverged = table.loc[table["diverged"] == "True", "run"].nunique()
    verb = "s and is a line of its own" if diverged == 1 else " and are lines of their own"
    return f" {diverged} diverge{verb}, marked ✕." if diverged else ""


def _plot(table: pd.DataFrame, rates: Rates, name: str, axis: str) -> go.Figure:
    plot = figure("step", axis, height=380)
    shown = table[table[name].notna()]
    if name == "norm":
        plot.update_layout(**logarithmic("yaxis"))
        shown = shown[shown[name] > 0]
    elif shown[name].min() < 0:
        plot.add_hline(y=0, line={"color": MUTED, "width": 1})
    for (method, lr, learning_rate, settings, diverged), group in shown.groupby(_GROUP, sort=False, dropna=False):
        steps = group.groupby("step")[name].agg(["mean", "min", "max", "count"]).reset_index()
        along = steps["step"].tolist()
        if (steps["count"] > 1).any():
            plot.add_scatter(
                x=along + along[::-1], y=steps["max"].tolist() + steps["min"].tolist()[::-1], mode="lines",
                line={"width": 0}, fill="toself", fillcolor=translucent(method, 0.16), hoverinfo="skip", meta=method,
            )  # fmt: skip
        # At the end, where sizes differ; all cosines to the own end are 1 there.
        lost = "✕ diverged" * (diverged == "True")
        name_at_end = lost or (safe(short(settings)) if name == "norm" else "")
        label = safe(" ".join(part for part in (name_of(method), rate(learning_rate), settings, lost) if part))
        plot.add_scatter(
            x=along, y=steps["mean"].tolist(), mode="lines+text", meta=method, hoverinfo="text",
            text=[""] * (len(along) - 1) + [name_at_end], textposition="top left",
            line={"color": colour(method), "width": 2.2, "dash": rates.dash(learning_rate)},
            hovertext=[
                f"<b>{label}</b> ({safe(lr)})<br>step {whole(row.step)}: {number(row.mean)}"
                + (f" ({number(row.min)} … {number(row.max)})" if row.count > 1 else "")
                for row in steps.itertuples(index=False, name="At")
            ],
        )  # fmt: skip
    return plot
