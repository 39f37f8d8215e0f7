"""Causal checks: what scaled, cut and merged updates do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from losslens.report import step_curves
from losslens.report.components import Cell, Column, Figure, Finding, Row, Section, Table, downloadable
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, difference, listed, number, p_value, percent, whole
from losslens.tables.style import INK, MUTED, SHADE, escape_markup, rows_figure, whisker

_TEXTS = ("kind", "how", "run", "run_b", "arm", "arm_b", "pairing", "null", "accuracy_verdict")
_NUMBERS = (
    "value", "draw", "norm", "kl", "loss", "loss_diff", "loss_diff_low", "loss_diff_high", "loss_diff_repeat",
    "accuracy", "n", "ci_low", "ci_high", "reference_accuracy", "accuracy_diff", "diff_low", "diff_high", "p_holm",
    "equivalence_margin", "accuracy_diff_repeat", "interaction", "hessian_cosine",
)  # fmt: skip
_TITLES = {
    "scaling": "Scaled updates",
    "equal_norm": "All at the smallest ‖ΔW‖",
    "equal_kl": "All at the smallest KL",
    "merging": "Merged updates",
    "restoring": "Restored directions",
}
_MERGES = {"sum": "a + b", "mean": "½(a + b)", "ties": "TIES", "dare": "DARE"}
_RESTORING = {
    "only_top": (
        "only_random",
        "Only the top k",
        "Everything but the k strongest directions of each module is restored.",
    ),
    "without_top": ("without_random", "Without the top k", "The k strongest directions of each module are restored."),
    "without_base_top": (
        "without_random_outputs",
        "Without W0's top k",
        "What each module writes into the k strongest output directions of W0 is restored.",
    ),
}
_NULL = " Grey: random directions, the null."
# Plotly's marks of the merges.
_MARKS = ("circle", "diamond", "square", "triangle-up")
_SCALED: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", "λ = 0 is the base, λ = 1 the run.", percent),
    "kl": ("KL, nats a token", "It grows as λ² while updates are small.", number),
    "loss": ("loss, nats a token", "A minimum before λ = 1: the run went too far for this text.", number),
}
_TRUE = "True"
# Most rows of a table that is open.
_MOST_OPEN = 15


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None if no weights were changed."""
    table = analysis.table("interventions", _TEXTS, _NUMBERS)
    changed = table[table["kind"] != "unchanged"]
    if changed.empty:
        return None
    comparison = LossComparison(analysis)
    names = {loss.arm: loss.name for loss in comparison.losses}
    figures = [*_scaling(table, comparison), *_merging(changed, names), *_restoring(table, comparison)]
    return Section(
        "interventions",
        "Causal checks",
        text=[
            "The weights of finished runs were changed, without training, and measured anew: greedy answers, KL to the "
            "base and loss on the probe set. A changed run is compared with the run itself, a merge with the better of "
            "its two runs, chosen for each half of the problems on the other half, over random halves."
        ],
        findings=_findings(changed),
        key=legend_of(comparison, table["arm"], lines=True),
        figures=figures,
        tables=[
            *(_table(kind, rows, names) for kind, rows in changed.groupby("kind", sort=False)),
            downloadable(analysis, "interventions"),
        ],
        notes=[
            "Verdicts: McNemar's exact test (a sign-flip test where the reference is a mean) and equivalence, each "
            "with Holm's correction over all rows of one kind that are no null. Repeat: the same merge of a loss with "
            "its own repeat, mean of the two losses; runs of one seed met the same batches, so it is merges of "
            "different seeds that compare with it. Definitions: docs/reference/measures.md of LossLens."
        ],
    )


def _findings(changed: pd.DataFrame) -> list[Finding]:
    findings = []
    for kind, title in _TITLES.items():
        rows = changed[(changed["kind"] == kind) & (changed["accuracy_verdict"] != "")]
        if rows.empty:
            continue
        counts = rows["accuracy_verdict"].value_counts()
        said = [f"{counts[word]} {word}" for word in ("better", "worse", "equivalent", "cannot say") if word in counts]
        beside = "the better of the two runs" if kind == "merging" else "the run itself"
        findings.append(Finding(f"{title}: of {len(rows)} accuracies, beside {beside}, {listed(said)}.", ""))
    return findings


def _scaling(table: pd.DataFrame, comparison: LossComparison) -> Iterator[Figure]:
    scaled = table[(table["kind"] == "scaling") | ((table["kind"] == "unchanged") & (table["how"] == "run"))]
    if (table["kind"] == "scaling").sum() == 0:
        return
    # The base is the point 0 of every run.
    base = table[(table["kind"] == "unchanged") & (table["how"] == "base")].drop(columns=["run"])
    at_zero = pd.DataFrame({"run": scaled["run"].unique()}).merge(base.assign(value=0.0), how="cross")
    points = pd.concat([scaled, at_zero], ignore_index=True).sort_values(["run", "value"], kind="stable")
    points = step_curves.by_loss(points.assign(step=points["value"]), comparison)
    for name, (axis, caption, show) in _SCALED.items():
        if points[name].notna().any():
            plot = step_curves.plot(points, comparison, name, axis, show, log=False, along="λ")
            plot.update_yaxes(tickformat=".0%" if show is percent else None)
            yield Figure(f"{axis[0].upper()}{axis.partition(',')[0][1:]} of λ·ΔW", caption, plot)


def _restoring(table: pd.DataFrame, comparison: LossComparison) -> Iterator[Figure]:
    for how, (null, title, caption) in _RESTORING.items():
        rows = table[table["how"] == how]
        if rows.empty or not rows["accuracy"].notna().any():
            continue
        points = step_curves.by_loss(rows.assign(step=rows["value"]), comparison)
        plot = step_curves.plot(points, comparison, "accuracy", "accuracy", percent, log=False, along="k")
        plot.update_yaxes(tickformat=".0%")
        random = table[(table["how"] == null) & table["accuracy"].notna()]
        for arm, own in random.groupby("arm", sort=False):
            plot.add_scatter(
                x=own["value"].tolist(), y=_rounded(own["accuracy"]), mode="markers", meta=arm, hoverinfo="text",
                marker={"symbol": "line-ew-open", "size": 14, "color": MUTED, "line": {"width": 2}},
                hovertext=[
                    f"<b>{escape_markup(str(arm))}</b>, random<br>k {whole(row.value)}: {percent(row.accuracy)}"
                    for row in own.itertuples()
                ],
            )  # fmt: skip
        yield Figure(title, f"{caption}{_NULL * bool(len(random))}", plot)


def _merging(changed: pd.DataFrame, names: dict[str, str]) -> Iterator[Figure]:
    merges = changed[(changed["kind"] == "merging") & changed["accuracy_diff"].notna()]
    if merges.empty:
        return
    merges = merges.assign(repeat=merges["arm"] == merges["arm_b"])
    merges = merges.sort_values("repeat", ascending=False, kind="stable")
    pairs = list(dict.fromkeys(zip(merges["run"], merges["run_b"], strict=True)))
    place = {pair: number for number, pair in enumerate(pairs)}
    labels = [
        f"{' + '.join(names.get(arm, arm) for arm in (first['arm'], first['arm_b']))}"
        f"{' (repeat)' * bool(first['repeat'])}"
        for _, first in merges.drop_duplicates(["run", "run_b"]).iterrows()
    ]
    plot = rows_figure("accuracy − that of the better run", labels, [float(at) for at in place.values()], pixels=34)
    plot.update_xaxes(tickformat="+.0%")
    plot.add_vline(x=0, line={"color": INK, "width": 1, "dash": "dot"})
    shown = [how for how in _MERGES if (merges["how"] == how).any()]
    for number_of, how in enumerate(shown):
        rows = merges[merges["how"] == how]
        offset = 0.18 * (number_of - (len(shown) - 1) / 2)
        for row in rows.itertuples():
            at = {"x": _rounded([row.accuracy_diff]), "y": [place[row.run, row.run_b] + offset]}
            bar = whisker(row.accuracy_diff, row.diff_low, row.diff_high, SHADE, thickness=3)
            plot.add_scatter(
                **at, error_x=bar, mode="markers", hoverinfo="text",
                marker={"symbol": _MARKS[number_of], "size": 8, "color": INK if row.repeat else MUTED},
                hovertext=[
                    f"<b>{_MERGES[how]}</b><br>{escape_markup(row.run)} + {escape_markup(row.run_b)}<br>"
                    f"{difference(row.accuracy_diff)} {escape_markup(row.accuracy_verdict)}"
                ],
            )  # fmt: skip
    marks = ", ".join(f"{_MERGES[how]} {mark}" for how, mark in zip(shown, "●◆■▲", strict=False))
    yield Figure(
        "Merges beside the better of their runs",
        f"{marks}. Bars: 95% over problems. Black: merges of a loss with its own repeat, the baseline.",
        plot,
        wide=True,
    )


def _table(kind: str, rows: pd.DataFrame, names: dict[str, str]) -> Table:
    title = _TITLES.get(kind, kind)
    cells = []
    for row in rows.itertuples():
        of = " + ".join(names.get(arm, arm) for arm in (row.arm, row.arm_b) if arm)
        who = " + ".join(run for run in (row.run, row.run_b) if run)
        cells.append(
            Row(
                [
                    Cell(of, below=who), Cell(_said(row.how, row.value)),
                    Cell(percent(row.accuracy), spread=_interval(row.ci_low, row.ci_high, percent)),
                    Cell(difference(row.accuracy_diff), spread=_interval(row.diff_low, row.diff_high, difference)),
                    *([Cell(difference(row.accuracy_diff_repeat))] * (kind == "merging")),
                    Cell(p_value(row.p_holm) if pd.notna(row.p_holm) else NOTHING),
                    Cell(row.accuracy_verdict or ("null" if row.null == _TRUE else NOTHING)),
                    Cell(number(row.kl, 4)), Cell(_signed(row.loss_diff)), Cell(number(row.norm)),
                    *([Cell(_signed(row.interaction)), Cell(number(row.hessian_cosine, 2))] * (kind == "merging")),
                ]
            )
        )  # fmt: skip
    columns = [
        Column("run", numeric=False), Column("change", numeric=False), Column("accuracy"), Column("difference"),
        *([Column("repeat")] * (kind == "merging")), Column("Holm"), Column("verdict", numeric=False),
        Column("KL"), Column("loss, difference"), Column("‖ΔW‖"),
        *([Column("interaction"), Column("Hessian cosine")] * (kind == "merging")),
    ]  # fmt: skip
    return Table(title, columns, cells, closed=len(cells) > _MOST_OPEN)


def _said(how: str, value: float) -> str:
    if how in _MERGES:
        return _MERGES[how]
    if how == "scaled":
        return f"λ = {number(value).rstrip('0').rstrip('.')}"
    return f"{how.replace('_', ' ')} {whole(value)}"


def _interval(low: float, high: float, show: Callable[[float], str]) -> str:
    return "" if pd.isna(low + high) else f"{show(low)} … {show(high)}"


def _signed(value: float) -> str:
    return NOTHING if pd.isna(value) else f"{'+' * (value > 0)}{number(value, 4)}"


def _rounded(values: pd.Series | list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
