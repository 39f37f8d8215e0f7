"""Every loss at its own best learning rate: the choice, its uncertainty, and the comparison at these rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import plotly.graph_objects as go

from losslens.report.components import Cell, Column, Figure, Finding, Matrix, Row, Section, Table, downloadable
from losslens.report.loss_comparison import LossComparison
from losslens.report.names import loss_name
from losslens.report.sections.glance import cosine_matrix
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, difference, listed, number, p_value, percent, rate, whole
from losslens.tables.style import INK, MUTED, colour, escape_markup, figure, plot_order, whisker

_RULES = ("equal steps", "equal norm")
# Sets of rates, as headings and in sentences.
_SETS = {
    "tuned": ("own best rate", "at the best rate of each loss"),
    "conventional": ("conventional rate", "at the conventional rates"),
    "matched": ("matched rate", "at the same rate for all"),
    "tuned, equal norm": ("own best rate at equal norm", "at equal norm and the rate that is best there"),
}
_TEXTS = (
    "loss", "method", "settings", "rule", "arm", "status", "select_on", "benchmark", "reported_on", "chosen",
    "may_be_best", "at_edge",
)  # fmt: skip
_NUMBERS = (
    "norm", "learning_rate", "runs", "diverged", "failed", "unfinished",
    "validation", "validation_n", "validation_low", "validation_high",
    "accuracy", "n", "ci_low", "ci_high",
)  # fmt: skip
_PAIR_TEXTS = ("rates", "loss_a", "loss_b", "arm_a", "arm_b", "pairing", "cosine_verdict", "accuracy_verdict")
_PAIR_NUMBERS = (
    "cosine", "accuracy_a", "accuracy_b", "learning_rate_a", "learning_rate_b", "accuracy_diff", "diff_low",
    "diff_high", "p_holm", "equivalence_margin",
)  # fmt: skip
_TRUE = "True"
# Runs that were both chosen on and reported on, and what stands for a verdict on them.
_SAME_RUNS, _NO_VERDICT = "same runs", "chosen and reported on the same run"
_NOT_ENDED = {"failed": "failed", "unfinished": "not finished"}
# Why rates were not chosen, in sentences; a norm that is not reached stands in the table.
_NOT_CHOSEN = {
    "diverged": "Diverged, and hence not chosen",
    "failed": "Failed, and hence not chosen",
    "not finished": "Not finished, and hence not chosen",
    "not scored": "Not scored on the problems to choose on, and hence not chosen",
    "no common seed": "Nothing is chosen, since the rates have no seed in common",
}
# Most rows of a table that is open.
_MOST_OPEN = 15


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None if no rates were chosen."""
    rates = analysis.table("tuning", _TEXTS, _NUMBERS)
    if rates.empty:
        return None
    pairs = analysis.table("tuning_pairs", _PAIR_TEXTS, _PAIR_NUMBERS)
    rates = rates.assign(
        name=[loss_name(row.method, math.nan, row.settings) for row in rates.itertuples()],
        order=rates["method"].map(plot_order),
    ).sort_values(["order", "settings", "learning_rate"], kind="stable")
    names = dict(zip(rates["loss"], rates["name"], strict=True))
    return Section(
        "tuning",
        "Every loss at its own best rate",
        text=[_about(rates), _how_to_read(rates)],
        findings=[Finding(text, "") for text in [*_choices(rates), *_comparisons(pairs)]],
        figures=[*_panels(rates), *_matrices(analysis, pairs)],
        tables=[
            downloadable(analysis, "tuning", "Chosen learning rates", *_choice_table(rates)),
            *_accuracy_table(rates, pairs),
            _pair_table(analysis, pairs, names),
        ],
        notes=_notes(rates, pairs),
    )


def _about(rates: pd.DataFrame) -> str:
    first = rates.iloc[0]
    seen, unseen = whole(rates["validation_n"].max()), whole(rates["n"].max())
    text = (
        f"The learning rate of each loss is the one with the highest score on {first['select_on']} ({seen} problems). "
        f"Accuracies are of {first['benchmark']} ({unseen} other problems), and of runs of other seeds where there are "
        "any: other problems alone do not undo the choice, since a run that was lucky in its seed is so on both."
    )
    norms = rates["norm"].dropna()
    if norms.empty:
        return text
    return (
        f"{text} It is made twice: at the end of training (equal steps), and at the first point at which ‖ΔW‖ is "
        f"{norms.iloc[0]:.4g} (equal norm), which every loss reaches at half at least of its rates that can be chosen."
    )


def _choices(rates: pd.DataFrame) -> Iterator[str]:
    """Yields how certain the choice is, and where the grid is too short, for each rule."""
    for rule, of_rule in _by_rule(rates):
        chosen = of_rule[of_rule["chosen"] == _TRUE]
        if chosen.empty:
            continue
        best = [f"{name} {rate(value)}" for name, value in zip(chosen["name"], chosen["learning_rate"], strict=True)]
        yield f"Best rates at {rule}: {listed(best)}.{_certainty(of_rule, chosen)}"
        edges = chosen.loc[chosen["at_edge"] == _TRUE, "name"].tolist()
        if edges:
            yield (
                f"At {rule} the best rate is at the end of the grid, and a better one may lie beyond it: "
                f"{listed(edges)}."
            )
        same = chosen.loc[chosen["reported_on"] == _SAME_RUNS, "name"].tolist()
        if same:
            yield (
                f"At {rule} chosen and reported on the same run, so that the accuracy is too high by the luck of its "
                f"seed, and has no verdict: {listed(same)}. Repeat the chosen rate with other seeds."
            )
        lost = chosen.loc[chosen["diverged"] > 0, "name"].tolist()
        if lost:
            yield f"At {rule} a repeat of the chosen rate diverged, and is not in its accuracy: {listed(lost)}."
    for status, text in _NOT_CHOSEN.items():
        at = rates[(rates["rule"] == _RULES[0]) & (rates["status"] == status)]
        if len(at):
            counts = at.groupby("name", sort=False).size()
            each = [f"{name} at {count} rate{'s' if count > 1 else ''}" for name, count in counts.items()]
            yield f"{text}: {listed(each)}."


def _certainty(rates: pd.DataFrame, chosen: pd.DataFrame) -> str:
    """Returns how many of the choices exclude all other rates, and which do not."""
    counts = rates.assign(known=rates["validation"].notna(), maybe=rates["may_be_best"] == _TRUE).groupby("loss")
    known, maybe = (chosen["loss"].map(counts[column].sum()) for column in ("known", "maybe"))
    several, unsure = (known > 1).sum(), chosen.loc[maybe > 1, "name"].tolist()
    text = ""
    if several:
        text = f" For {several - len(unsure)} of {several} losses every other rate is worse by more than chance"
        text += f"; another rate may be the best one of {listed(unsure)}." if unsure else "."
    alone = chosen.loc[known == 1, "name"].tolist()
    return text + (f" Only one rate could be chosen: {listed(alone)}." if alone else "")


def _comparisons(pairs: pd.DataFrame) -> Iterator[str]:
    """Yields the numbers of significant differences in accuracy and the median cosine, for each set of rates.

    Only pairs of losses that all sets have are counted, so that the sets can be compared.
    """
    between = pairs[pairs["loss_b"] != "base"]
    sets = [name for name in _SETS if (between["rates"] == name).any()]
    if not sets:
        return
    keys = [set(map(frozenset, _losses(between[between["rates"] == name]))) for name in sets]
    common = set.intersection(*keys)
    if not common:
        return
    of_common = " that all sets have" if any(key != common for key in keys) else ""
    between = between[[frozenset(key) in common for key in _losses(between)]]
    for name in sets:
        of_set = between[between["rates"] == name]
        differ = of_set["accuracy_verdict"].isin(["better", "worse"]).sum()
        equal, count, where = (of_set["accuracy_verdict"] == "equivalent").sum(), len(of_set), _SETS[name][1]
        text = f"{where[0].upper()}{where[1:]}, {differ} of {count} pair{'s' * (count != 1)} of losses{of_common} "
        text += f"differ{'s' * (count == 1)} significantly in accuracy (p ≤ .05 after Holm's correction)"
        if equal:
            margin = f"{100 * of_set['equivalence_margin'].max():g}"
            text += f"; {equal} {'is' if equal == 1 else 'are'} equivalent within ±{margin} points"
        untold = (of_set["accuracy_verdict"] == _NO_VERDICT).sum()
        text += f"; {untold} without a verdict ({_NO_VERDICT})" if untold else ""
        cosine = of_set["cosine"].median()
        yield text + (f". The median cosine of two losses is {number(cosine)}." if not math.isnan(cosine) else ".")


def _losses(pairs: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(pairs["loss_a"], pairs["loss_b"], strict=True))


def _by_rule(rates: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(rule, rates[rates["rule"] == rule]) for rule in _RULES if (rates["rule"] == rule).any()]


def _panels(rates: pd.DataFrame) -> list[Figure]:
    """Draws the validation score over the rate, one small plot per loss on the same axes."""
    known = rates[rates["validation"].notna()]
    if known.empty:
        return []
    # All plots have the same ranges, with room for marks at their ends.
    low, high = math.log10(rates["learning_rate"].min()), math.log10(rates["learning_rate"].max())
    room = 0.08 * max(high - low, 0.5)
    top = min(1.0, known["validation_high"].max()) + 0.03
    ticks = sorted(set(rates["learning_rate"]))
    figures = []
    for name, of_loss in rates.groupby("name", sort=False):
        plot = figure("learning rate (log)", f"score on {escape_markup(rates.iloc[0]['select_on'])}", height=240)
        plot.update_xaxes(
            type="log", range=[low - room, high + room], tickvals=ticks, ticktext=[rate(tick) for tick in ticks]
        )
        plot.update_yaxes(tickformat=".0%", range=[-0.03, top])
        ink = colour(of_loss.iloc[0]["method"])
        for rule, of_rule in _by_rule(of_loss):
            _line(plot, of_rule[of_rule["validation"].notna()], rule, ink)
        lost = of_loss[(of_loss["rule"] == _RULES[0]) & (of_loss["diverged"] > 0)]
        if len(lost):
            plot.add_scatter(
                x=lost["learning_rate"].tolist(), y=[0] * len(lost), mode="markers", hoverinfo="text",
                hovertext=[f"{whole(count)} diverged" for count in lost["diverged"]],
                marker={"symbol": "x", "size": 10, "color": INK},
            )  # fmt: skip
        figures.append(Figure(str(name), "", plot))
    return figures


def _how_to_read(rates: pd.DataFrame) -> str:
    text = "Each plot shows the score over the learning rate, with 95% intervals. Solid: equal steps"
    text += "; dotted: equal norm" if (rates["rule"] == _RULES[1]).any() else ""
    text += ". Ring: the chosen rate. Filled: may be the best one; open: worse by more than chance."
    return text + (" ✕: a run diverged." if (rates["diverged"] > 0).any() else "")


def _line(plot: go.Figure, points: pd.DataFrame, rule: str, ink: str) -> None:
    at_end = rule == _RULES[0]
    places = points["learning_rate"].tolist(), points["validation"].tolist()
    ink = ink if at_end else MUTED
    line = {"color": ink, "width": 2, "dash": "solid" if at_end else "dot"}
    plot.add_scatter(x=places[0], y=places[1], mode="lines", line=line, hoverinfo="skip")
    chosen = points[points["chosen"] == _TRUE]
    plot.add_scatter(
        x=chosen["learning_rate"].tolist(), y=chosen["validation"].tolist(), mode="markers", hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 18, "color": ink, "line": {"width": 2}},
    )  # fmt: skip
    for _, point in points.iterrows():
        best, low, high = point["may_be_best"] == _TRUE, point["validation_low"], point["validation_high"]
        hover = (
            f"{rate(point['learning_rate'])}, {rule}: {percent(point['validation'])} ({percent(low)} … {percent(high)})"
        )
        plot.add_scatter(
            x=[point["learning_rate"]], y=[point["validation"]], mode="markers", hoverinfo="text", hovertext=[hover],
            marker={"symbol": "circle" if best else "circle-open", "size": 8, "color": ink},
            error_y=whisker(point["validation"], low, high, ink, thickness=1.2),
        )  # fmt: skip


def _matrices(analysis: AnalysisFolder, pairs: pd.DataFrame) -> list[Matrix]:
    """Builds the matrix of cosines of each set of rates."""
    comparison = LossComparison(analysis)
    matrices = []
    for name, (heading, _) in _SETS.items():
        of_set = pairs[(pairs["rates"] == name) & pairs["cosine"].notna()]
        arms = {*of_set["arm_a"], *of_set["arm_b"]}
        losses = sorted((s for s in comparison.losses if s.arm in arms), key=lambda s: (plot_order(s.method), s.arm))
        if losses:
            title = f"Cosine of the updates, {heading}"
            matrices.append(cosine_matrix(comparison, losses, title, "Dotted: the repeat of a loss."))
    return matrices


def _choice_table(rates: pd.DataFrame) -> tuple[list[Column], list[Row]]:
    """Builds the columns and rows of the chosen rates: for each rule the rate, score, neighbours and accuracy."""
    rules = _by_rule(rates)
    columns = [Column("loss", numeric=False)]
    for rule, _ in rules:
        ending = f", {rule}" * (len(rules) > 1)
        columns += [
            Column(f"best rate{ending}"), Column(f"score to choose by{ending}"), Column(f"neighbours{ending}"),
            Column(f"accuracy{ending}"),
        ]  # fmt: skip
    columns.append(Column("diverged"))
    rows = []
    for name, of_loss in rates.groupby("name", sort=False):
        cells = [Cell(str(name), colour=colour(of_loss.iloc[0]["method"]))]
        for rule, _ in rules:
            cells += _choice_cells(of_loss[of_loss["rule"] == rule].reset_index(drop=True))
        at_ends = of_loss[of_loss["rule"] == _RULES[0]]
        counts = {name: at_ends[name].fillna(0).sum() for name in ("runs", "diverged", "failed", "unfinished")}
        lost, total = counts["diverged"], counts["runs"] + counts["diverged"]
        others = [f"{whole(counts[key])} {word}" for key, word in _NOT_ENDED.items() if counts[key]]
        cells.append(Cell(f"{whole(lost)} of {whole(total)} runs", below="\n".join(others)))
        rows.append(Row(cells, marked=bool(lost)))
    return columns, rows


def _choice_cells(rates: pd.DataFrame) -> list[Cell]:
    places = rates.index[rates["chosen"] == _TRUE]
    if places.empty:
        return [Cell(NOTHING)] * 4
    place = int(places[0])
    best = rates.iloc[place]
    others = rates[(rates["may_be_best"] == _TRUE) & (rates["chosen"] != _TRUE)]
    maybe = f"or {listed([rate(value) for value in others['learning_rate']])}" if len(others) else ""
    neighbours = [rates.iloc[n] for n in (place - 1, place + 1) if 0 <= n < len(rates)]
    return [
        Cell(rate(best["learning_rate"]), below=maybe, bad="at the end of the grid" * (best["at_edge"] == _TRUE)),
        Cell(percent(best["validation"]), below=_interval(best, "validation_low", "validation_high")),
        Cell("", below="\n".join(f"{rate(row['learning_rate'])}: {_score(row)}" for row in neighbours)),
        Cell(
            percent(best["accuracy"]), below=_interval(best, "ci_low", "ci_high"),
            bad=_NO_VERDICT * (best["reported_on"] == _SAME_RUNS),
        ),
    ]  # fmt: skip


def _score(row: pd.Series) -> str:
    return percent(row["validation"]) if row["status"] in ("compared", "") else str(row["status"])


def _interval(row: pd.Series, low: str, high: str) -> str:
    return "" if math.isnan(row[low]) else f"95% {percent(row[low])} … {percent(row[high])}"


def _accuracy_table(rates: pd.DataFrame, pairs: pd.DataFrame) -> list[Table]:
    """Builds the table of accuracies of each loss at each set of rates, with the difference to the base."""
    sets = [name for name in _SETS if (pairs["rates"] == name).any()]
    rows = []
    for loss, of_loss in rates.groupby("loss", sort=False):
        cells = [Cell(of_loss.iloc[0]["name"], colour=colour(of_loss.iloc[0]["method"]))]
        for name in sets:
            of_set = pairs[(pairs["rates"] == name) & ((pairs["loss_a"] == loss) | (pairs["loss_b"] == loss))]
            cells.append(_accuracy_cell(of_set, str(loss)) if len(of_set) else Cell(NOTHING))
        rows.append(Row(cells))
    columns = [Column("loss", numeric=False), *(Column(_SETS[name][0]) for name in sets)]
    return [Table("Accuracy, and the difference to the base", columns, rows)] if sets else []


def _accuracy_cell(pairs: pd.DataFrame, loss: str) -> Cell:
    first = pairs.iloc[0]
    side = "a" if first["loss_a"] == loss else "b"
    lines = [rate(first[f"learning_rate_{side}"])]
    for _, row in pairs[pairs["loss_b"] == "base"].iterrows():
        tested = "" if math.isnan(row["p_holm"]) else f", p (Holm) {p_value(row['p_holm'])}"
        lines += [f"{difference(row['accuracy_diff'])}{tested}", row["accuracy_verdict"]]
    return Cell(percent(first[f"accuracy_{side}"]), below="\n".join(lines))


def _pair_table(analysis: AnalysisFolder, pairs: pd.DataFrame, names: dict[str, str]) -> Table:
    """Builds the table of every two losses, with cosine and difference in accuracy at each set of rates."""
    between = pairs[pairs["loss_b"] != "base"]
    sets = [name for name in _SETS if (between["rates"] == name).any()]
    rows = []
    for a, b in dict.fromkeys(_losses(between)):
        cells = [Cell(f"{names.get(a, a)} – {names.get(b, b)}")]
        for name in sets:
            same = between[(between["rates"] == name) & (between["loss_a"] == a) & (between["loss_b"] == b)]
            cells += _pair_cells(same.iloc[0]) if len(same) else [Cell(NOTHING)] * 2
        rows.append(Row(cells))
    heads = [f"{what}, {_SETS[name][0]}" for name in sets for what in ("cosine", "accuracy of the first − second")]
    columns = [Column("losses", numeric=False), *map(Column, heads)]
    table = downloadable(analysis, "tuning_pairs", "Every two losses, at each set of rates", columns, rows)
    return replace(table, closed=len(rows) > _MOST_OPEN)


def _pair_cells(row: pd.Series) -> list[Cell]:
    verdict = row["cosine_verdict"] if row["cosine_verdict"] != "too few seeds" else ""
    tested = f"{difference(row['diff_low'])} … {difference(row['diff_high'])}\np (Holm) {p_value(row['p_holm'])}\n"
    below = tested * (not math.isnan(row["p_holm"])) + row["accuracy_verdict"]
    return [Cell(number(row["cosine"]), below=verdict), Cell(difference(row["accuracy_diff"]), below=below)]


def _notes(rates: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    notes = [
        "A rate may be the best one unless it is worse than the chosen one by more than chance: paired by problem, "
        "p ≤ .05 after Bonferroni's correction for the rates of the loss. It is about other problems, not other seeds.",
        "Holm's correction is for the comparisons of one set of rates: every two losses, and each with the base.",
        "Of equal scores the smaller rate is chosen. The choice is made on the seeds that all rates of a loss have; a "
        "rate of which one of these runs diverged is not chosen. Runs of other seeds never change the choice.",
        "At their best rates, losses are reported on seeds that took no part in the choice; at the conventional and "
        "the matched rates, on the seeds that all rates of the loss have.",
    ]
    if pairs["pairing"].isin(["same seeds", "same order"]).any():
        notes.append(
            "Cosines are of runs that share their batches, and read too high, unless both losses were repeated with "
            "another seed at these rates."
        )
    if (rates["rule"] == _RULES[1]).any():
        norm = rates["norm"].dropna().iloc[0]
        notes.append(
            "Cosines are of the ends of the runs; for those at equal norm: analyze.py checkpoint=norm "
            f"target_norm={norm:.6g}."
        )
    return notes
