"""The statistics: accuracy tests of every two losses on the same problems, and the differences they could detect."""

from __future__ import annotations

import pandas as pd

from losslens.report.components import Cell, Column, Row, Section, Table, downloadable
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, difference, number, p_value, percent, whole, within
from losslens.tables.style import colour, loss_title

# Most rows shown; longer tables are left to the CSV file.
_MOST = 150
_BETTER = {"better": "first better", "worse": "second better"}


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None if no two losses were scored on the same problems."""
    comparison = LossComparison(analysis)
    pairs = comparison.arm_pairs
    pairs = pairs[pairs["accuracy_diff"].notna()]
    if pairs.empty:
        return None
    spread = _spread(analysis)
    return Section(
        "statistics",
        "Statistics",
        text=[_summary(analysis, pairs), *_detectable(pairs)],
        tables=[_table(analysis, comparison, pairs), *([spread] if spread else [])],
        notes=[
            "Difference, interval and p are computed from the share of correct answers to each problem, averaged over "
            "the runs of a loss. p: sign-flip test on the differences per problem (for two single runs, McNemar's "
            "exact test). Holm: p corrected for all comparisons of this table that have one.",
            "Equivalent: two one-sided tests, corrected by Holm in the same way, show that the two differ by less than "
            f"`equivalence_margin`{_margin(pairs)}. Within: the smallest margin that the pair would pass by "
            "itself. Cannot say: neither a difference nor equivalence is shown.",
            "Detectable: the difference that the exact test at Holm's first threshold would detect in four of five "
            "samples of this many problems, if the two disagreed as often as they do here (–: none would be detected, "
            "or the comparison averages over runs).",
            "Tests and intervals are over problems; they say nothing about other seeds.",
        ],
    )


def _summary(analysis: AnalysisFolder, pairs: pd.DataFrame) -> str:
    family = analysis.manifest.get("holm_family") or {}
    tests = int(pairs["p_holm"].notna().sum())
    counts = pairs["accuracy_verdict"].value_counts()
    differ = int(counts.get("better", 0) + counts.get("worse", 0))
    outcomes = [f"{differ} differ{'s' * (differ == 1)}"]
    if equal := int(counts.get("equivalent", 0)):
        outcomes.append(f"{equal} {'is' if equal == 1 else 'are'} equivalent{_margin(pairs)}")
    if open_ := int(counts.get("cannot say", 0)):
        outcomes.append(f"about {open_} the data cannot say")
    which = {"all": "all comparisons", "reference": "those with the reference and the base"}
    benchmark = analysis.manifest.get("benchmark")
    on = f" on {benchmark}" if benchmark else ""
    return (
        f"{len(pairs)} comparison{'s' * (len(pairs) != 1)} of losses with each other and with the base{on}, each "
        "on the same problems. "
        f"Holm's correction covers {which.get(family.get('pairs', ''), 'the family')}, {tests} "
        f"test{'s' * (tests != 1)}: {', '.join(outcomes)}."
    )


def _margin(pairs: pd.DataFrame) -> str:
    margin = pairs["equivalence_margin"].max()
    return "" if pd.isna(margin) else f" ({100 * margin:g} points)"


def _detectable(pairs: pd.DataFrame) -> list[str]:
    known = pairs["detectable_diff"].dropna()
    if known.empty:
        return []
    low, middle, high = known.min(), known.median(), known.max()
    return [
        f"To be detected in four of five samples of this size, a difference would have to be {percent(middle)} in the "
        f"median comparison ({percent(low)} where two disagree least, {percent(high)} where they disagree most)."
    ]


def _table(analysis: AnalysisFolder, comparison: LossComparison, pairs: pd.DataFrame) -> Table:
    losses = {loss.arm: loss for loss in comparison.losses}
    shown, caption = pairs, "Every two losses, and each with the base; smallest p first"
    if len(pairs) > _MOST:
        reference = comparison.reference
        ends = {"base", reference.arm if reference else ""}
        shown = pairs[pairs[["arm_a", "arm_b"]].isin(ends).any(axis=1)]
        caption = f"Comparisons with the reference and the base; all {len(pairs)} are in arm_pairs.csv"
    columns = [
        Column("first", numeric=False), Column("second", numeric=False), Column("difference"), Column("95% interval"),
        Column("p"), Column("p (Holm)"), Column("within"), Column("verdict", numeric=False), Column("detectable"),
    ]  # fmt: skip
    rows = []
    for _, pair in shown.sort_values("p", kind="stable").iterrows():
        ends_of = [losses.get(pair[arm]) for arm in ("arm_a", "arm_b")]
        names = [
            Cell(loss.name, colour=colour(loss.method)) if loss else Cell(pair[arm])
            for loss, arm in zip(ends_of, ("arm_a", "arm_b"), strict=True)
        ]
        interval = f"{difference(pair['diff_low'])} … {difference(pair['diff_high'])}"
        cells = [
            *names, Cell(difference(pair["accuracy_diff"])), Cell(interval), Cell(p_value(pair["p"])),
            Cell(p_value(pair["p_holm"])), Cell(within(pair["equivalent_within"])),
            Cell(_BETTER.get(pair["accuracy_verdict"], pair["accuracy_verdict"]) or NOTHING),
            Cell(percent(pair["detectable_diff"])),
        ]  # fmt: skip
        rows.append(Row(cells))
    return downloadable(analysis, "arm_pairs", caption, columns, rows)


def _spread(analysis: AnalysisFolder) -> Table | None:
    numbers = (
        "learning_rate",
        "seeds",
        "accuracy_mean",
        "accuracy_std",
        "accuracy_min",
        "accuracy_max",
        "norm_mean",
        "norm_std",
    )
    seeds = analysis.table("seeds", ("method", "lr", "benchmark"), numbers)
    if seeds.empty:
        return None
    columns = [
        Column("loss", numeric=False), Column("runs"), Column("accuracy"), Column("worst … best"), Column("‖ΔW‖"),
    ]  # fmt: skip
    rows = [
        Row(
            [
                Cell(loss_title(row["method"]), below=row["lr"], colour=colour(row["method"])),
                Cell(whole(row["seeds"])),
                Cell(percent(row["accuracy_mean"]), f"± {percent(row['accuracy_std'])}", row["benchmark"]),
                Cell(f"{percent(row['accuracy_min'])} … {percent(row['accuracy_max'])}"),
                Cell(number(row["norm_mean"]), f"± {number(row['norm_std'])}"),
            ]
        )
        for _, row in seeds.iterrows()
    ]
    return downloadable(analysis, "seeds", "Spread over seeds: mean ± standard deviation", columns, rows)
