"""Hundreds of adapters: a heat map of their cosines in the order of the clusters, a map, and a table to search."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from losslens.measures import run_weight_measures
from losslens.report.components import Cell, Column, Figure, Row, Section, Table, downloadable
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, number, percent, whole
from losslens.tables.style import AGAINST, ALONG, PAPER, escape_markup, figure

# Qualitative colours of Tol's bright scheme; clusters beyond them, and of one adapter, are grey.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
_OTHER = "#9aa0a6"
_PIXELS = 720


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None for an analysis with every measure."""
    if analysis.manifest.get("measures") != "cosines":
        return None
    sizes = [measure.name for measure in run_weight_measures()]
    runs = analysis.table("runs", ("run", "nearest"), (*sizes, "nearest_cosine", "cluster", "place"))
    runs = runs.sort_values("place", kind="stable", na_position="last").reset_index(drop=True)
    pairs = analysis.table("pairs", ("run_a", "run_b"), ("cosine", "cosine_null"))
    placed = runs[runs["place"].notna()]
    figures = [_heat_map(placed, pairs), _map(analysis, placed)] if len(placed) > 1 else []
    clusters = placed["cluster"].value_counts()
    single = int((clusters == 1).sum())
    text = [
        f"{len(runs)} adapters, {len(runs) * (len(runs) - 1) // 2:,} pairs: norms and cosines alone. "
        f"{len(clusters)} cluster{'s' * (len(clusters) != 1)}"
        + f", of which {single} of one adapter" * bool(single)
        + ": average linkage of the angles arccos(cosine), up to a mean angle of 60° (a cosine of one half)."
    ]
    error = analysis.manifest.get("cosine_error") or {}
    if error.get("largest") is not None:
        of_null = error.get("largest_of_null")
        text.append(
            f"Cosines are of 8-bit products: of {error['of_pairs']} pairs the largest difference from float32 is "
            f"{error['largest']:.1g}" + (f", and of their nulls {of_null:.1g}." if of_null is not None else ".")
        )
    if pairs["cosine_null"].notna().any():
        beyond = (pairs["cosine"].abs() > pairs["cosine_null"])[pairs["cosine_null"].notna()].mean()
        text.append(
            "Null of the cosine, for two updates with nothing in common but the inputs on which they act: at most "
            f"{number(pairs['cosine_null'].max())} in any pair; {percent(beyond)} "
            "of the pairs are beyond their own."
        )
    return Section(
        "adapters",
        "Adapters",
        text=text,
        figures=figures,
        tables=[_table(analysis, runs), downloadable(analysis, "mds")],
        notes=["pairs.csv, with the cosine of every pair and its null, is in the folder of this page."],
    )


def _heat_map(runs: pd.DataFrame, pairs: pd.DataFrame) -> Figure:
    place = {name: number for number, name in enumerate(runs["run"])}
    cosines = np.eye(len(place))
    known = pairs[pairs["cosine"].notna()]
    first, second = (known[run].map(place).to_numpy(dtype=int) for run in ("run_a", "run_b"))
    cosines[first, second] = cosines[second, first] = known["cosine"]
    names = [escape_markup(name) for name in runs["run"]]
    plot = figure("", "", height=_PIXELS)
    # Hundredths as small integers: a byte a pair.
    plot.add_trace(
        go.Heatmap(
            z=np.clip(np.round(100 * cosines), -100, 100).astype(np.int8), x=names, y=names, zmin=-100, zmax=100,
            colorscale=[[0, AGAINST], [0.5, PAPER], [1, ALONG]], hovertemplate="%{x}<br>%{y}<br>cosine: %{z} / 100"
            "<extra></extra>",
            colorbar={"tickvals": [-100, -50, 0, 50, 100], "ticktext": ["−1", "−½", "0", "½", "1"], "thickness": 12},
        )
    )  # fmt: skip
    plot.update_xaxes(showticklabels=False, ticks="", showgrid=False)
    plot.update_yaxes(showticklabels=False, ticks="", showgrid=False, autorange="reversed")
    return Figure(
        "Cosine of every two updates",
        "Rows and columns are ordered by cluster, and adapters alike are neighbours. Point at a cell for its names.",
        plot,
        wide=True,
    )


def _map(analysis: AnalysisFolder, runs: pd.DataFrame) -> Figure:
    points = analysis.table("mds", ("run",), ("x", "y")).set_index("run").reindex(runs["run"])
    sizes = runs["cluster"].value_counts()
    ranked = [cluster for cluster in sizes.index if sizes[cluster] > 1][: len(_COLOURS)]
    inks = dict(zip(ranked, _COLOURS, strict=False))
    plot = figure("degrees", "degrees", height=460)
    plot.add_scatter(
        x=points["x"].round(2).tolist(), y=points["y"].round(2).tolist(), mode="markers",
        marker={"size": 7, "opacity": 0.8, "color": [inks.get(cluster, _OTHER) for cluster in runs["cluster"]]},
        hoverinfo="text", hovertext=[
            f"<b>{escape_markup(run)}</b><br>cluster {whole(cluster)}"
            for run, cluster in zip(runs["run"], runs["cluster"], strict=True)
        ],
    )  # fmt: skip
    plot.update_yaxes(scaleanchor="x")
    kept = (analysis.manifest.get("mds") or {}).get("variance_kept")
    shown = f" The plane shows {percent(kept)} of the variance." if kept is not None else ""
    return Figure(
        "Map of the updates",
        f"Multidimensional scaling of the angles between all of them; the largest clusters are coloured.{shown}",
        plot,
        wide=True,
    )


def _table(analysis: AnalysisFolder, runs: pd.DataFrame) -> Table:
    measures = [measure for measure in run_weight_measures("more") if runs[measure.name].notna().any()]
    rows = [
        Row(
            [
                Cell(run["run"]), Cell(whole(run["cluster"])), *(Cell(m.show(run[m.name])) for m in measures),
                Cell(run["nearest"] or NOTHING), Cell(number(run["nearest_cosine"])),
            ]
        )
        for _, run in runs.iterrows()
    ]  # fmt: skip
    columns = [
        Column("adapter", numeric=False), Column("cluster"), *(Column(measure.heading) for measure in measures),
        Column("nearest", numeric=False), Column("cosine"),
    ]  # fmt: skip
    return replace(downloadable(analysis, "runs", "Adapters, by cluster", columns, rows), searched=True)
