"""The profile: which layers and projections each loss's update lies in."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.report.components import Figure, Section
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import percent
from losslens.tables.style import escape_markup, figure, rows_figure

# Steps of one colour: the projections are neither losses nor a scale.
_INKS = ("#37474f", "#78909c", "#b0bec5", "#5d4037", "#a1887f", "#d7ccc8", "#455a64", "#90a4ae")
_COLUMNS = ("run", "module", "layer", "norm")
_TEXT = (
    "How the squared norm of each update, ‖ΔW‖² = Σ ‖ΔW_m‖² over modules m, is divided among projections and layers; "
    "means over the runs of a loss. It says where weights moved, not what that did: the same change does more in some "
    "layers than in others. The profile distance of two runs is half the sum of the differences of these shares."
)


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without the table of runs and modules, or for a single module."""
    parquet = analysis.parquet("run_modules", _COLUMNS)
    if set(parquet.column_names) != set(_COLUMNS):
        return None
    shares = _shares(parquet.to_pandas(), LossComparison(analysis))
    by = {name: shares.groupby(["loss", name], sort=False)["share"].sum().unstack() for name in ("projection", "layer")}
    figures = [
        Figure(title, caption, draw(by[name]), wide=name == "projection")
        for name, title, caption, draw in (
            ("projection", "Share of ‖ΔW‖² by projection", "One bar per loss; the parts add up to 1.", _bars),
            ("layer", "Share of ‖ΔW‖² by layer", "Layer −1: modules outside the layers.", _map),
        )
        if not shares.empty and by[name].shape[1] > 1
    ]
    return Section("profile", "Where the weights moved", text=[_TEXT], figures=figures) if figures else None


def _shares(table: pd.DataFrame, comparison: LossComparison) -> pd.DataFrame:
    """Returns the mean share of each loss and module: `loss`, `projection`, `layer`, `share`; losses in plot order."""
    squared = table.assign(squared=table["norm"] ** 2)
    total = squared.groupby("run")["squared"].transform("sum")
    squared = squared.assign(share=squared["squared"] / total.where(total > 0)).dropna(subset=["share"])
    parts = []
    for loss in comparison.losses:
        own = squared[squared["run"].isin(loss.runs)]
        mean = own.groupby(["module", "layer"], sort=False)["share"].mean().reset_index()
        projection = mean["module"].astype(str).str.rpartition(".", expand=False).str[-1]
        parts.append(mean.assign(loss=loss.name, projection=projection))
    return pd.concat(parts) if parts else pd.DataFrame(columns=["module", "layer", "share", "loss", "projection"])


def _bars(shares: pd.DataFrame) -> go.Figure:
    places = [float(place) for place in range(len(shares))]
    plot = rows_figure("share of ‖ΔW‖²", [str(loss) for loss in shares.index], places, pixels=26)
    for number, (name, column) in enumerate(shares.items()):
        plot.add_bar(
            x=column, y=places, orientation="h", name=escape_markup(str(name)), hoverinfo="text",
            marker={"color": _INKS[number % len(_INKS)], "line": {"color": "white", "width": 1}},
            hovertext=[
                f"<b>{escape_markup(str(loss))}</b><br>{escape_markup(str(name))}: {percent(share)}"
                for loss, share in column.items()
            ],
        )  # fmt: skip
    plot.update_layout(barmode="stack", showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    plot.update_layout(margin={"t": 40}, height=plot.layout.height + 40)
    plot.update_xaxes(tickformat=".0%", range=[0, 1])
    return plot


def _map(shares: pd.DataFrame) -> go.Figure:
    shares = shares[sorted(shares)]
    plot = figure("layer", "", height=int(90 + 26 * len(shares)))
    plot.add_heatmap(
        x=[str(layer) for layer in shares], y=[escape_markup(str(loss)) for loss in shares.index], z=shares.to_numpy(),
        colorscale=[[0, "#ffffff"], [1, _INKS[0]]], zmin=0, xgap=1, ygap=1, hoverinfo="text",
        colorbar={"tickformat": ".0%", "thickness": 10, "outlinewidth": 0},
        hovertext=[
            [f"<b>{escape_markup(str(loss))}</b><br>layer {layer}: {percent(share)}" for layer, share in row.items()]
            for loss, row in shares.iterrows()
        ],
    )  # fmt: skip
    plot.update_xaxes(type="category")
    plot.update_yaxes(autorange="reversed", ticks="", showline=False, title=None)
    return plot
