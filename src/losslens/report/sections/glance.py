"""At a glance: the question, what was compared, the findings, the cosines and the accuracies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from losslens.report.arm_comparison import arm_rows, base_on
from losslens.report.caveats import caveats, own_rows
from losslens.report.components import Cell, Column, Figure, Matrix, Row, Section, Square, Table
from losslens.report.findings import findings, ratio, repeats_of
from losslens.report.loss_comparison import ComparedLoss, LossComparison, LossPairValue
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import listed, number, percent, whole
from losslens.tables.style import AGAINST, ALONG, DARK, INK, colour, escape_markup, rows_figure, whisker

# Most losses for which a ceiling fits under each cosine.
_MOST_WITH_CEILINGS = 9
# Most losses for which three digits fit; the third distinguishes 0.997 from 1.
_MOST_WITH_THREE = 16
_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without a trained run."""
    comparison = LossComparison(analysis)
    if not comparison.losses:
        return None
    cosines = cosine_matrix(comparison, comparison.losses, "Cosine of the updates", _cosine_caption(comparison))
    figures: list[Figure | Matrix] = [cosines] if len(comparison.losses) > 1 else []
    accuracies = _accuracies(analysis, comparison)
    return Section(
        "glance",
        "At a glance",
        text=[f"What did each loss do to the weights? {_compared(analysis, comparison)}"],
        findings=findings(analysis, comparison),
        figures=[*figures, *([accuracies] if accuracies else [])],
        tables=[_table(comparison)] if figures else [],
        notes=caveats(analysis, comparison),
    )


def _compared(analysis: AnalysisFolder, comparison: LossComparison) -> str:
    """Describes the runs, their rollouts and their base, as far as the manifest records them."""
    trained = [loss for loss in comparison.losses if not math.isnan(loss.learning_rate)]
    methods = len({loss.method for loss in trained})
    losses, elsewhere = len(trained), len(comparison.losses) - len(trained)
    kinds = f"{_count(methods)} loss{'es' * (methods != 1)}"
    if losses != methods:
        kinds += f" in {losses} settings" if losses > methods else ""
    origins = analysis.manifest.get("origins") or {}
    rollouts = origins.get("rollouts") or []
    runs = len(comparison.runs) - elsewhere
    adapters = f"{_count(elsewhere)} external adapter{'s' * (elsewhere != 1)}"
    if not trained:
        return f"{adapters[0].upper()}{adapters[1:]}."
    text = f"{kinds[0].upper()}{kinds[1:]}, {runs} run{'s' * (runs != 1)}"
    if len(rollouts) == 1 and rollouts[0].get("rollouts"):
        counts = rollouts[0]
        text += (
            f", trained on the same {counts['rollouts']} rollouts of {counts['prompts']} prompts "
            f"({percent(counts['pass_rate'])} of the rollouts are correct; {percent(counts['share_mixed_groups'])} of "
            "the prompts have both correct and incorrect ones)"
        )
        if own := own_rows(analysis, comparison):
            text += f", but for {listed(own)}, which sampled {'its' if len(own) == 1 else 'their'} own,"
    if len(origins.get("base") or []) == 1:
        text += " from the same base"
    initial = {run.get("initial_adapter") for run in (origins.get("runs") or {}).values()}
    if len(initial - {None}) == 1 and runs > 1:
        text += " and initial adapter"
    elif len(initial - {None}) > 1:
        text += f" and {_count(len(initial - {None}))} initial adapters"
    trained_whole = comparison.runs["rank"].isna() & comparison.runs["learning_rate"].notna()
    if initial - {None} and trained_whole.any():
        text += " (full fine-tuning starts from the base itself)"
    return f"{text}; {adapters}." if elsewhere else f"{text}."


def _count(number_: int) -> str:
    return _WORDS[number_] if number_ < len(_WORDS) else str(number_)


def cosine_matrix(comparison: LossComparison, losses: Sequence[ComparedLoss], title: str, caption: str) -> Matrix:
    """Builds the matrix of the cosines of every two of `losses`, with their repeats on the diagonal."""
    return Matrix(
        title,
        caption,
        [loss.name for loss in losses],
        [[_square(comparison, a, b, len(losses)) for b in losses] for a in losses],
        low=AGAINST,
        high=ALONG,
        wide=len(losses) > _MOST_WITH_CEILINGS,
    )


def _square(comparison: LossComparison, first: ComparedLoss, second: ComparedLoss, count: int) -> Square:
    cosine = comparison.of("cosine", first, second)
    if not cosine.known:
        return Square(_brief(cosine.value, 3))
    roomy = count <= _MOST_WITH_CEILINGS and not math.isnan(cosine.level)
    return Square(
        _brief(cosine.value, 3 if count <= _MOST_WITH_THREE else 2),
        f"of {_brief(cosine.level, 2)} → {_brief(cosine.relative, 2)}" if roomy else "",
        _hover(first, second, cosine),
        ALONG if cosine.value > 0 else AGAINST,
        min(abs(cosine.value), 1.0),
        cosine.value > DARK,
    )


def _brief(value: float, digits: int) -> str:
    """Formats a cosine without its leading 0: `.951`."""
    text = number(value, digits)
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def _table(comparison: LossComparison) -> Table:
    """Repeats the matrix as a table, for readers who cannot see or hover it."""
    losses = comparison.losses
    rows = []
    for a in losses:
        cells = []
        for b in losses:
            cosine = comparison.of("cosine", a, b)
            cells.append(Cell(number(cosine.value), "", "\n".join(_lines_below(cosine))))
        rows.append(Row([Cell(a.name, colour=colour(a.method)), *cells]))
    columns = [Column("loss", numeric=False), *(Column(loss.name) for loss in losses)]
    return Table("Cosine of the updates, in numbers", columns, rows, closed=True)


def _lines_below(cosine: LossPairValue) -> list[str]:
    """Returns the lines below a cosine: ceiling and ratio, verdict, null."""
    lines = [] if math.isnan(cosine.level) else [f"ceiling {number(cosine.level)}, ratio {ratio(cosine, ', 95%')}"]
    lines += [cosine.verdict] * (cosine.verdict not in ("", "too few seeds"))
    return lines + ([] if math.isnan(cosine.null) else [f"null {number(cosine.null)}"])


def _cosine_caption(comparison: LossComparison) -> str:
    losses = comparison.losses
    cosines = {(a, b): comparison.of("cosine", a, b) for a in losses for b in losses}
    own = any(cosine.known for (a, b), cosine in cosines.items() if a is b)
    sentences = ["Dotted: the repeat of each loss (its cosine with itself, trained again)"]
    sentences[0] += "; – if it was trained only once." if own else "; not known, since each was trained only once."
    others = [cosine for (a, b), cosine in cosines.items() if a is not b and cosine.known]
    if any(cosine.pairing in ("same seeds", "same order") for cosine in others):
        sentences.append("Losses without runs of different seeds are compared by runs that share their batches.")
    if any(not math.isnan(cosine.level) for cosine in others) and len(losses) <= _MOST_WITH_CEILINGS:
        sentences.append(
            "Below each cosine: “of” its ceiling, √(ρρ') of the two repeats, which the two would show if they were the "
            "same loss; “→” its ratio to the ceiling."
        )
    nulls = [cosine.null for cosine in others if not math.isnan(cosine.null)]
    if nulls:
        low, high = number(min(nulls)), number(max(nulls))
        span = low if low == high else f"{low} to {high}"
        sentences.append(
            f"Null: the absolute cosine of two updates with nothing in common (but A) stays below {span} in 95 of 100 "
            "cases."
        )
    return " ".join(sentences)


def _hover(first: ComparedLoss, second: ComparedLoss, cosine: LossPairValue) -> str:
    over = f"{cosine.pairs} pair{'s' * (cosine.pairs != 1)} of runs, {cosine.pairing or 'unknown seeds'}"
    again = f"{first.name}, trained again{f' (different {cosine.changed})' if cosine.changed else ''}"
    lines = [
        f"{first.name} and {second.name}" if first is not second else again,
        f"cosine {number(cosine.value)} ({over})",
    ]
    repeats = repeats_of(first, second, cosine)
    return "\n".join([*lines, *([repeats] if repeats else []), *_lines_below(cosine)])


def _accuracies(analysis: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    arms = arm_rows(analysis)
    if arms.empty or not arms["accuracy"].notna().any():
        return None
    by_arm = arms.set_index("arm")
    losses = [loss for loss in comparison.losses if loss.arm in by_arm.index]
    if not losses:
        return None
    places = [float(place) for place in range(len(losses))]
    plot = rows_figure("accuracy", [loss.name for loss in losses], places, pixels=34 if len(losses) < 10 else 24)
    looks = comparison.looks
    plot.update_xaxes(tickformat=".0%")
    base = base_on(analysis, arms["benchmark"])
    for _, row in base.head(1).iterrows():
        plot.add_vline(x=row["accuracy"], line={"color": INK, "width": 1.5, "dash": "dot"})
        plot.add_vrect(x0=row["ci_low"], x1=row["ci_high"], fillcolor="rgba(128,128,128,0.12)", line_width=0)
    several = False
    for place, loss in zip(places, losses, strict=True):
        arm = by_arm.loc[loss.arm]
        if pd.isna(arm["accuracy"]):
            continue
        look = looks.of(loss.arm, loss.method)
        interval = f"{percent(arm['ci_low'])} … {percent(arm['ci_high'])}"
        hover = f"<b>{escape_markup(loss.name)}</b><br>{percent(arm['accuracy'])} ({interval})"
        if arm["seeds"] > 1 and not pd.isna(arm["accuracy_min"]):
            several = True
            hover += f"<br>{whole(arm['seeds'])} runs: {percent(arm['accuracy_min'])} … {percent(arm['accuracy_max'])}"
            plot.add_scatter(
                x=[arm["accuracy_min"], arm["accuracy_max"]], y=[place, place], mode="markers", hoverinfo="skip",
                marker={"symbol": "line-ns", "size": 9, "line": {"color": INK, "width": 1.5}},
            )  # fmt: skip
        plot.add_scatter(
            x=[arm["accuracy"]], y=[place], mode="markers", hoverinfo="text", hovertext=[hover],
            error_x=whisker(arm["accuracy"], arm["ci_low"], arm["ci_high"], look.colour, thickness=2, width=0),
            marker={"color": look.colour, "symbol": look.symbol, "size": 11, "line": {"color": INK, "width": 0.7}},
        )  # fmt: skip
    n = whole(arms["n"].max())
    line = " Dotted line and grey band: the untrained base." if len(base) else " The base was not scored."
    ticks = " Vertical ticks: the worst and the best run." if several else ""
    benchmark = next(name for name in arms["benchmark"] if name)
    return Figure(
        f"Accuracy on {benchmark}",
        f"Share of {n} problems answered correctly, with 95% intervals.{line}{ticks}",
        plot,
    )
