"""The family of losses: what weighs each token, whether the updates cluster by it, and who leaves its class when."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go

from losslens.report import step_curves
from losslens.report.components import Cell, Column, Figure, Finding, Row, Section, Table, downloadable
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, listed, number, p_value, percent, whole
from losslens.tables.style import GRID, INK, MUTED, RULE, colour, escape_markup

_FACTORS = ("outcome", "gate", "saturation", "length")
_TEXTS = ("arm", "method", "unit", *_FACTORS, "stops", "bounded", "first_step")
_CLUSTER_TEXTS = ("factor", "groups", "differ", "verdict")
_CLUSTER_NUMBERS = ("losses", "pseudo_f", "explained", "expected", "p", "p_min", "p_holm")
_CLASS_TEXTS, _CLASS_NUMBERS = ("first_step", "arm", "representative"), ("step", "seeds", "cosine", "repeats", "repeat")
_WEIGHTS = ("weight_correct", "weight_incorrect")
# What the factors are called in sentences.
_SAID = {
    "outcome": "what the reward decides",
    "gate": "how they weigh the tokens of a rollout",
    "saturation": "how they saturate",
    "length": "how they count long rollouts",
    "unit": "single rollouts or pairs",
    "learning_rate": "their learning rate",
}
_CLUSTERED, _CANNOT_TELL, _SETTINGS_DIFFER = "clustered", "too few losses to tell", "settings differ"
# Fewest snapshots, the last among them, at which a loss is less like its class than the repeat if it has left it.
_SUSTAINED = 2
# Columns of the small plots, one for each loss.
_ACROSS, _PIXELS = 4, 150


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None unless two losses declare the factors of their weights."""
    factors = analysis.table("factors", _TEXTS, ()).set_index("arm")
    comparison = LossComparison(analysis)
    names = {loss.arm: loss.name for loss in comparison.losses if loss.arm in factors.index}
    if len(names) < 2:
        return None
    clusters = analysis.table("clusters", _CLUSTER_TEXTS, _CLUSTER_NUMBERS)
    classes = analysis.table("classes", _CLASS_TEXTS, _CLASS_NUMBERS)
    weights = _weights(analysis, comparison, names)
    figures = [*([weights] if weights else []), *([_course(classes, comparison)] if len(classes) else [])]
    return Section(
        "family",
        "The family of losses",
        text=[
            "The gradient of these losses is that of a weighted log-likelihood, −Σ w·log π; divergences from the base "
            "come on top. The weight w of a token has four factors: what the reward decides, how the tokens of one "
            "rollout are told apart, how the weight changes as the rollout is learned, and how long rollouts count."
        ],
        findings=_findings(clusters),
        key=legend_of(comparison, classes["arm"], lines=True) if len(classes) else None,
        figures=figures,
        tables=[
            _factor_table(analysis, factors, names),
            *([_cluster_table(analysis, clusters)] if len(clusters) else []),
            *([_class_table(analysis, classes, factors, names)] if len(classes) else []),
        ],
        notes=_notes(clusters, classes),
    )


def _findings(clusters: pd.DataFrame) -> list[Finding]:
    if clusters.empty:
        return []
    if (clusters["verdict"] == _SETTINGS_DIFFER).any():
        differ = _SAID.get(clusters["differ"].iloc[0], clusters["differ"].iloc[0])
        text = f"Whether the updates cluster by a factor of the losses cannot be told: they differ in {differ}, too."
        return [Finding(text, "family")]
    found = clusters[clusters["verdict"] == _CLUSTERED].sort_values("explained", ascending=False)
    findings = [
        Finding(
            f"Losses that agree in {_SAID[row.factor]} have updates that lie closer together: it explains "
            f"{percent(row.explained)} of their variance, {percent(row.expected)} by chance (p {p_value(row.p_holm)}, "
            "Holm).",
            "family",
        )
        for row in found.itertuples()
    ]
    able = clusters[clusters["verdict"] != _CANNOT_TELL]
    if found.empty and len(able):
        text = "For none of the factors that could be tested is it shown that the updates cluster by it"
        least = able.loc[able["p"].idxmin()]
        findings.append(
            Finding(f"{text} (smallest p {p_value(least['p_holm'])}, Holm: {_SAID[least['factor']]}).", "family")
        )
    unable = clusters.loc[clusters["verdict"] == _CANNOT_TELL, "factor"]
    if len(unable):
        text = f"The losses are too few to tell whether their updates cluster by {listed([_SAID[f] for f in unable])}"
        findings.append(Finding(f"{text}: with groups of these sizes no result would be significant.", "family"))
    return findings


def _factor_table(analysis: AnalysisFolder, factors: pd.DataFrame, names: dict[str, str]) -> Table:
    rows = []
    for arm, name in names.items():
        about = factors.loc[arm]
        words = [about[factor] for factor in _FACTORS]
        bounded = {"True": "yes", "False": "no"}.get(about["bounded"], NOTHING)
        cells = [Cell(word or NOTHING) for word in (about["unit"], *words, about["stops"], bounded)]
        rows.append(Row([Cell(name, colour=colour(about["method"])), *cells]))
    headings = ("loss", "one term per", "reward", "tokens", "saturation", "length", "weights vanish when", "bounded")
    return downloadable(
        analysis, "factors", "What weighs each token", [Column(heading, numeric=False) for heading in headings], rows
    )


def _cluster_table(analysis: AnalysisFolder, clusters: pd.DataFrame) -> Table:
    rows = [
        Row(
            [
                Cell(row.factor.replace("_", " ")), Cell(row.groups), Cell(number(row.pseudo_f, 2)),
                Cell(percent(row.explained)), Cell(percent(row.expected)), Cell(p_value(row.p)),
                Cell(p_value(row.p_holm)),
                Cell(row.verdict, below=f"in {row.differ.replace('_', ' ')}" * bool(row.differ)),
            ]
        )
        for row in clusters.itertuples()
    ]  # fmt: skip
    columns = [
        Column("factor", numeric=False), Column("losses in each group", numeric=False), Column("pseudo-F"),
        Column("explained"), Column("by chance"), Column("p"), Column("Holm"),
        Column("verdict", numeric=False),
    ]  # fmt: skip
    losses = whole(clusters["losses"].max())
    return downloadable(analysis, "clusters", f"Do the updates of the {losses} losses cluster?", columns, rows)


def _class_table(
    analysis: AnalysisFolder, classes: pd.DataFrame, factors: pd.DataFrame, names: dict[str, str]
) -> Table:
    rows = []
    for (arm, other), steps in classes.groupby(["arm", "representative"], sort=False):
        first, last = steps.iloc[0], steps.iloc[-1]
        differ = [factor for factor in _FACTORS if factors.loc[arm, factor] != factors.loc[other, factor]]
        cells = [
            Cell(names.get(arm, arm), colour=colour(factors.loc[arm, "method"])), Cell(first["first_step"]),
            Cell(names.get(other, other)), Cell(", ".join(differ) or "options only"),
            Cell(number(first["cosine"]), below=f"step {whole(first['step'])}"),
            Cell(number(last["cosine"]), below=f"step {whole(last['step'])}"),
            Cell(NOTHING if math.isnan(last["repeat"]) else number(last["repeat"])), _leaves(steps),
        ]  # fmt: skip
        rows.append(Row(cells))
    columns = [
        Column("loss", numeric=False), Column("class", numeric=False), Column("compared with", numeric=False),
        Column("differs in", numeric=False), Column("cosine, first"), Column("cosine, last"), Column("repeat, last"),
        Column("leaves its class", numeric=False),
    ]  # fmt: skip
    return downloadable(analysis, "classes", "First-step classes", columns, rows)


def _leaves(steps: pd.DataFrame) -> Cell:
    """Says from which snapshot on a loss is less like the one it is compared with than that one's repeat."""
    known = steps[steps["repeat"].notna()].sort_values("step")
    if known.empty:
        return Cell(NOTHING)
    below = known["cosine"] < known["repeat"]
    ever_after = known[below[::-1].cummin()[::-1]]
    if len(ever_after) >= _SUSTAINED:
        return Cell(f"step {whole(ever_after['step'].iloc[0])}")
    once = f"below at {listed([f'step {whole(step)}' for step in known.loc[below, 'step']])}, not sustained"
    return Cell("not within the run", below=once * bool(below.any()))


def _notes(clusters: pd.DataFrame, classes: pd.DataFrame) -> list[str]:
    notes = ["Equations: docs/reference/losses of LossLens; the factors: docs/reference/losses/family.md."]
    if len(clusters):
        notes.append(
            "Clustering: permutational analysis of variance of the squared distances 1 − cosine of its ceiling, "
            "over one arm per method with equal settings, at one learning rate or, if more methods have it, their "
            "conventional ones; then there is no verdict. p from 9,999 permutations of the losses, Holm's correction "
            "over the rows whose groups can reach p ≤ .05. Factors overlap: a loss differs from another in several of "
            "them, so a small p does not say that "
            "this factor is the cause."
        )
    if len(classes):
        notes.append(
            "A class: losses with the same gradient, up to scale, while the model is the base; at the same learning "
            "rate, AdamW's first step is then the same. Cosines are of runs with the same seeds. A loss leaves its "
            "class at the snapshot from which on, at all later ones and two at least, it is less like the loss it is "
            "compared with than that loss is like itself with another data order (the repeat)."
        )
    return notes


def _course(classes: pd.DataFrame, comparison: LossComparison) -> Figure:
    table = classes.assign(run=classes["arm"])
    table = step_curves.by_loss(table, comparison)
    methods = {loss.arm: loss.method for loss in comparison.losses}
    table = table.assign(loss_of=classes["arm"], method_of=[methods.get(arm, "") for arm in classes["arm"]])
    plot = step_curves.plot(table, comparison, "cosine", "cosine to the first loss of its class", log=False)
    for other, rows in classes[classes["repeat"].notna()].groupby("representative", sort=False):
        repeat = rows.groupby("step")["repeat"].first()
        plot.add_scatter(
            x=repeat.index.tolist(), y=[float(f"{value:.4g}") for value in repeat], mode="lines", hoverinfo="text",
            line={"color": MUTED, "width": 1.5, "dash": "dot"},
            hovertext=[f"repeat of {escape_markup(str(other))}: {number(value)}" for value in repeat],
        )  # fmt: skip
    dotted = " Dotted: the repeats." if classes["repeat"].notna().any() else ""
    return Figure(
        "Cosine to the first loss of the class",
        f"Losses of one first-step class begin with the same step and part later.{dotted}",
        plot,
    )


def _weights(analysis: AnalysisFolder, comparison: LossComparison, names: dict[str, str]) -> Figure | None:
    """Builds small plots, one per loss: the mean weight of correct and of incorrect rollouts over the steps."""
    table = analysis.table("training", ("run",), ("step", *_WEIGHTS))
    table = step_curves.by_loss(table, comparison)
    table = table[table["loss_of"].isin(names) & table[list(_WEIGHTS)].notna().any(axis=1)]
    shown = [arm for arm in names if (table["loss_of"] == arm).any()]
    if not shown:
        return None
    rows = -(-len(shown) // _ACROSS)
    plot = go.Figure(
        layout={
            "template": "none", "height": 40 + _PIXELS * rows, "margin": {"l": 44, "r": 8, "t": 26, "b": 30},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "showlegend": False,
            "font": {"family": "system-ui, sans-serif", "size": 11, "color": INK}, "hovermode": "closest",
            "dragmode": False, "grid": {"rows": rows, "columns": _ACROSS, "pattern": "independent", "ygap": 0.45},
        }
    )  # fmt: skip
    for place, arm in enumerate(shown, 1):
        end = "" if place == 1 else str(place)
        steps = table[table["loss_of"] == arm].groupby("step")[list(_WEIGHTS)].mean()
        size = steps.abs().max().max()
        for name, ink, dash in ((_WEIGHTS[0], "#3f90da", "solid"), (_WEIGHTS[1], "#bd1f01", "dash")):
            if not (known := steps[name].dropna()).empty:
                plot.add_scatter(
                    x=known.index.tolist(), y=[float(f"{value:.4g}") for value in known / (size or 1)], mode="lines",
                    line={"color": ink, "width": 2, "dash": dash}, xaxis=f"x{end}", yaxis=f"y{end}", meta=arm,
                    hoverinfo="text", hovertext=[
                        f"<b>{escape_markup(names[arm])}</b>, {name.replace('weight_', '')} rollouts"
                        f"<br>step {whole(step)}: w = {number(value)}" for step, value in known.items()
                    ],
                )  # fmt: skip
        axis = {"gridcolor": GRID, "linecolor": RULE, "zerolinecolor": RULE, "zeroline": True, "nticks": 3}
        plot.update_layout({f"xaxis{end}": axis, f"yaxis{end}": {**axis, "range": [-1.1, 1.1]}})
        plot.add_annotation(
            text=f"{escape_markup(names[arm])} ({number(size)})", x=0.5, y=1.0, xref=f"x{end} domain",
            yref=f"y{end} domain", yanchor="bottom", showarrow=False, font={"size": 11},
        )  # fmt: skip
    return Figure(
        "Weight of correct and of incorrect rollouts",
        "The mean weight of a token over the steps: solid for correct, dashed for incorrect rollouts. Each plot is "
        "scaled by the largest weight, in brackets. Below 0, tokens are made less likely.",
        plot,
        wide=True,
    )
