"""The training curves: what each run logged while it was trained."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from losslens.report.arms import short
from losslens.report.folder import AnalysisFolder
from losslens.report.numbers import number, rate, whole
from losslens.report.parts import Figure, Key, Section, downloadable
from losslens.report.style import Rates, colour, figure, in_order, logarithmic, name_of, safe, translucent

_TITLES = {"loss": "Loss", "grad_norm": "Norm of the gradient", "lr": "Learning rate"}
# More points than pixels only make the page heavy.
_MOST_POINTS = 200


def section(analysis: AnalysisFolder) -> Section | None:
    """The section; None where nothing was logged."""
    names = [name for name in analysis.columns("training") if name not in ("run", "step")]
    table = analysis.table("training", ("run",), ("step", *names))
    shown = [name for name in names if table[name].nunique() > 1]
    if not shown:
        return None
    runs = analysis.table("runs", ("run", "method", "arm", "lr"), ("learning_rate",)).drop_duplicates("run")
    runs["arm"] = runs["arm"].where(runs["arm"] != "", runs["method"] + " " + runs["lr"])
    table = table.merge(runs[["run", "method", "arm", "learning_rate"]], on="run", how="left", suffixes=("", "_peak"))
    table = table.fillna({"method": "", "arm": ""})
    rates = Rates(table["learning_rate"])
    several = table.groupby(["arm", "step"])["run"].nunique().max() > 1
    spread = " A line is the mean over seeds, the band goes from the smallest to the largest." if several else ""
    return Section(
        "training",
        "Training",
        text=[f"As it was logged. The losses of two methods are two quantities: compare their course.{spread}"],
        key=Key(
            [(name, colour(name)) for name in in_order(table["method"])],
            [(rates.dash(value), rate(value)) for value in rates.values],
            lines=True,
        ),
        figures=[Figure(_TITLES.get(name, name), "", _plot(table, rates, name)) for name in shown],
        tables=[downloadable(analysis, "training")],
    )


def _plot(table: pd.DataFrame, rates: Rates, name: str) -> go.Figure:
    shown = table[np.isfinite(table[name])]
    steep = bool(shown[name].min() > 0 and shown[name].max() > 20 * shown[name].min())
    show = rate if name == "lr" else number
    plot = figure("step", f"{safe(_TITLES.get(name, name).lower())}{' (log)' * steep}", height=320)
    if steep:
        plot.update_layout(**logarithmic("yaxis"))
    for (method, arm, learning_rate), group in shown.groupby(
        ["method", "arm", "learning_rate"], sort=False, dropna=False
    ):
        steps = group.groupby("step")[name].agg(["mean", "min", "max", "count"]).reset_index()
        steps = steps.iloc[np.unique(np.linspace(0, len(steps) - 1, _MOST_POINTS).astype(int))]
        along = steps["step"].tolist()
        label = " ".join(part for part in (name_of(method), rate(learning_rate), short(arm.partition(" ")[2])) if part)
        if (steps["count"] > 1).any():
            plot.add_scatter(
                x=along + along[::-1], y=_round([*steps["max"], *steps["min"][::-1]]), mode="lines", line={"width": 0},
                fill="toself", fillcolor=translucent(method, 0.16), hoverinfo="skip", meta=method,
            )  # fmt: skip
        plot.add_scatter(
            x=along, y=_round(steps["mean"]), mode="lines", meta=method, hoverinfo="text",
            line={"color": colour(method), "width": 1.8, "dash": rates.dash(learning_rate)},
            hovertext=[
                f"<b>{safe(label)}</b><br>step {whole(row.step)}: {show(row.mean)}"
                for row in steps.itertuples(index=False, name="At")
            ],
        )  # fmt: skip
    return plot


def _round(values: pd.Series | list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
