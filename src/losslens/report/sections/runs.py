"""The runs: the size of each update and the accuracy of each model."""

from __future__ import annotations

import pandas as pd

from losslens.measures import run_measures
from losslens.report.components import Cell, Column, Figure, Row, Section, Table, downloadable
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import LossComparison
from losslens.report.names import run_name, setting_text
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, difference, percent, rate, whole
from losslens.tables.style import INK, colour, escape_markup, loss_title, rows_figure, whisker

_TEXTS = ("run", "label", "method", "lr", "benchmark", "diverged")
_NUMBERS = (
    "learning_rate", "seed", "init_seed", *(measure.name for measure in run_measures("main")),
    "accuracy", "n", "ci_low", "ci_high",
    "base_diff", "base_diff_low", "base_diff_high",
    "finished", "tokens_correct", "base_tokens_diff", "base_tokens_low", "base_tokens_high",
)  # fmt: skip


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without runs."""
    runs = analysis.table("runs", _TEXTS, _NUMBERS)
    if runs.empty:
        return None
    # The same numbers as on the terminal.
    runs["number"] = runs["run"].map({name: place for place, name in enumerate(dict.fromkeys(runs["run"]))})
    comparison = LossComparison(analysis)
    benchmarks = [name for name in runs["benchmark"].unique() if name]
    diverged = runs[runs["diverged"] != ""].drop_duplicates("run")
    return Section(
        "runs",
        "Runs",
        key=legend_of(comparison, comparison.arms.values(), lines=False) if benchmarks else None,
        figures=[_accuracies(runs, name, comparison) for name in benchmarks],
        tables=[_table(analysis, runs, len(benchmarks) > 1)],
        notes=[f"Run {row.number} ({row.run}): {row.diverged}." for row in diverged.itertuples()],
    )


def _accuracies(runs: pd.DataFrame, benchmark: str, comparison: LossComparison) -> Figure:
    # A diverged run was not scored; it is shown without a score.
    shown = runs[(runs["benchmark"] == benchmark) | ((runs["diverged"] != "") & (runs["benchmark"] == ""))]
    trained = shown[shown["method"] != "base"]
    base = shown[(shown["method"] == "base") & shown["accuracy"].notna()]
    inits = trained["init_seed"].nunique() > 1
    labels = [f"{'✕ ' * bool(row['diverged'])}{run_name(row, inits)}" for _, row in trained.iterrows()]
    places = [float(place) for place in range(len(trained))] or [0.0]
    plot = rows_figure("accuracy", labels, places, pixels=20)
    plot.update_xaxes(tickformat=".0%")
    for place, (_, row) in zip(places, trained.iterrows(), strict=False):
        bad, arm = bool(row["diverged"]), comparison.arms[row["run"]]
        look = comparison.looks.of(arm, row["method"])
        hover = f"{escape_markup(row['run'])}<br>accuracy {percent(row['accuracy'])} ({_interval(row)})"
        if bad and pd.isna(row["accuracy"]):
            plot.add_annotation(
                x=0.01, xref="paper", y=place, text=f"✕ {escape_markup(row['diverged'])}", showarrow=False,
                xanchor="left", font={"size": 12},
            )  # fmt: skip
            continue
        plot.add_scatter(
            x=[row["accuracy"]], y=[place], mode="markers", meta=arm, hoverinfo="text",
            hovertext=[f"{hover}<br>✕ {escape_markup(row['diverged'])}" if bad else hover],
            error_x=whisker(row["accuracy"], row["ci_low"], row["ci_high"], look.colour, thickness=1.5),
            marker={
                "color": look.colour, "size": 11 if bad else 9, "line": {"color": INK, "width": 0.7},
                "symbol": "x" if bad else look.symbol,
            },
        )  # fmt: skip
    for _, row in base.iterrows():
        plot.add_vline(x=row["accuracy"], line={"color": INK, "width": 1.5, "dash": "dot"})
        plot.add_vrect(x0=row["ci_low"], x1=row["ci_high"], fillcolor="rgba(128,128,128,0.12)", line_width=0)
    count = whole(shown["n"].max())
    line = " Dotted line and grey band: the untrained base." if len(base) else ""
    crosses = " ✕: a run that diverged or collapsed." if (trained["diverged"] != "").any() else ""
    seeds = " s: the seed (data order); A: the init_seed (initial adapter)." if inits else " s: the seed."
    return Figure(
        f"Accuracy on {benchmark}",
        f"Share of {count} problems that a run answers correctly, with 95% intervals.{line}{crosses}{seeds}",
        plot,
        wide=True,
    )


def _table(analysis: AnalysisFolder, runs: pd.DataFrame, several: bool) -> Table:
    lengths = bool(runs["finished"].notna().any())  # not recorded by earlier versions
    columns = [
        Column("run", numeric=False), Column("method", numeric=False),
        Column("learning rate"), Column("seed"), Column("init seed"),
        *(Column(measure.label) for measure in run_measures("main")),
        *([Column("benchmark", numeric=False)] if several else []),
        Column("accuracy"), Column("95% interval"), Column("vs base"),
        *([Column("tokens, correct"), Column("finished")] if lengths else []),
    ]  # fmt: skip
    rows = []
    for _, row in runs.iterrows():
        cells = [
            Cell(f"{row['number']} {row['run']}", bad=f"✕ {row['diverged']}" if row["diverged"] else ""),
            Cell(
                loss_title(row["method"]), below=f"{row['lr']} {setting_text(row)}".strip(),
                colour=colour(row["method"]),
            ),
            Cell(rate(row["learning_rate"])), Cell(whole(row["seed"])), Cell(whole(row["init_seed"])),
            *(Cell(measure.show(row[measure.name])) for measure in run_measures("main")),
            *([Cell(row["benchmark"] or NOTHING)] if several else []), Cell(percent(row["accuracy"])),
            Cell(_interval(row)), _to_the_base(row),
            *([_length(row), Cell(percent(row["finished"]))] if lengths else []),
        ]  # fmt: skip
        rows.append(Row(cells, marked=bool(row["diverged"])))
    return downloadable(analysis, "runs", "Every run and the base", columns, rows)


def _interval(row: pd.Series) -> str:
    return NOTHING if pd.isna(row["ci_low"]) else f"{percent(row['ci_low'])} … {percent(row['ci_high'])}"


def _to_the_base(row: pd.Series) -> Cell:
    if pd.isna(row["base_diff"]):
        return Cell(NOTHING)
    interval = f"{difference(row['base_diff_low'])} … {difference(row['base_diff_high'])}"
    return Cell(difference(row["base_diff"]), below=interval)


def _length(row: pd.Series) -> Cell:
    """Shows the median length of correct answers, and the difference to the base's on the same problems."""
    if pd.isna(row["base_tokens_diff"]):
        return Cell(whole(row["tokens_correct"]))
    ends = (
        f"{row[name]:+.1f}".replace("-", "−") for name in ("base_tokens_diff", "base_tokens_low", "base_tokens_high")
    )
    return Cell(whole(row["tokens_correct"]), below="{} [{}, {}]".format(*ends))
