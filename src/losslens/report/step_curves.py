"""Plots of numbers over training steps: the mean over the runs of each loss, with their spread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from losslens.report.loss_comparison import LossComparison
from losslens.tables.format import number, whole
from losslens.tables.style import INK, PlotStyle, escape_markup, figure, logarithmic, translucent

# More points than pixels only make the page larger.
_MOST_POINTS = 200
# Marks on a line: enough to identify it without covering it.
_MARKS = 7


def by_loss(table: pd.DataFrame, comparison: LossComparison) -> pd.DataFrame:
    """Adds to a table of runs and steps the loss (`loss_of`, the arm) and the method (`method_of`) of each run."""
    methods = {loss.arm: loss.method for loss in comparison.losses}
    arms = [comparison.arms.get(run, run) for run in table["run"]]
    return table.assign(loss_of=arms, method_of=[methods.get(arm, "") for arm in arms])


def spread(table: pd.DataFrame) -> str:
    """Returns the sentence that explains lines and bands; empty if no loss has several runs."""
    several = len(table) and table.groupby(["loss_of", "step"])["run"].nunique().max() > 1
    return " Lines are means over seeds; bands go from the smallest to the largest value." if several else ""


def plot(
    table: pd.DataFrame,
    comparison: LossComparison,
    name: str,
    axis: str,
    show: Callable[[float], str] = number,
    log: bool | None = None,
    lost: str = "",
    along: str = "step",
) -> go.Figure:
    """Plots a column over the steps, one line per loss.

    Args:
        table: A table from `by_loss`.
        comparison: The losses.
        name: The column.
        axis: The title of the y axis.
        show: Formats a value.
        log: True for a logarithmic axis; by default if the values span more than a factor of 20.
        lost: A boolean column, true for runs that diverged; these get their own lines, which end in a cross.
        along: The name of what the column `step` holds.
    """
    shown = table[np.isfinite(table[name])]
    if log is None:
        log = bool(shown[name].min() > 0 and shown[name].max() > 20 * shown[name].min())
    drawn = figure(along, f"{escape_markup(axis)}{' (log)' * log}", height=320)
    if log:
        drawn.update_layout(**logarithmic("yaxis"))
        shown = shown[shown[name] > 0]
    names = {loss.arm: loss.name for loss in comparison.losses}
    for group, rows in shown.groupby(["loss_of", "method_of", *([lost] if lost else [])], sort=False, dropna=False):
        arm, method, diverged = (*group, False)[:3]
        label = f"{names.get(arm, arm)}{' ✕ diverged' * bool(diverged)}"
        _line(
            drawn, rows, name, comparison.looks.of(arm, method), arm, escape_markup(label), bool(diverged), show, along
        )
    return drawn


def _line(
    drawn: go.Figure,
    rows: pd.DataFrame,
    name: str,
    look: PlotStyle,
    loss: str,
    label: str,
    diverged: bool,
    show: Callable[[float], str],
    along: str,
) -> None:
    steps = rows.groupby("step")[name].agg(["mean", "min", "max", "count"]).reset_index()
    steps = steps.iloc[np.unique(np.linspace(0, len(steps) - 1, _MOST_POINTS).astype(int))]
    places = steps["step"].tolist()
    if (steps["count"] > 1).any():
        drawn.add_scatter(
            x=places + places[::-1], y=_round([*steps["max"], *steps["min"][::-1]]), mode="lines", line={"width": 0},
            fill="toself", fillcolor=translucent(look.colour, 0.16), hoverinfo="skip", meta=loss,
        )  # fmt: skip
    drawn.add_scatter(
        x=places, y=_round(steps["mean"]), mode="lines+markers", meta=loss, hoverinfo="text",
        line={"color": look.colour, "width": 2, "dash": look.dash},
        marker={"symbol": look.symbol, "color": look.colour, "size": 8, "maxdisplayed": _MARKS},
        hovertext=[
            f"<b>{label}</b><br>{along} {_place(row.step)}: {show(row.mean)}"
            + (f" ({show(row.min)} … {show(row.max)})" if row.count > 1 else "")
            for row in steps.itertuples(index=False, name="At")
        ],
    )  # fmt: skip
    if diverged:
        drawn.add_scatter(
            x=places[-1:], y=_round(steps["mean"][-1:]), mode="markers", meta=loss, hoverinfo="skip",
            marker={"symbol": "x", "size": 12, "color": look.colour, "line": {"color": INK, "width": 0.7}},
        )  # fmt: skip


def _round(values: pd.Series | list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _place(value: float) -> str:
    return whole(value) if value == int(value) else number(value).rstrip("0")
