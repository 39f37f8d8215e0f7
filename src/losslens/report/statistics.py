"""The statistics: every pair on the same problems, what the tests say, and what they could have shown."""

from __future__ import annotations

import pandas as pd

from losslens.report.folder import AnalysisFolder
from losslens.report.names import setting_of
from losslens.report.numbers import NOTHING, difference, number, p_value, percent, rate, whole
from losslens.report.parts import Cell, Column, Row, Section, Table, downloadable
from losslens.report.style import colour, name_of

_TEXTS = ("run_a", "run_b", "verdict")
_NUMBERS = (
    "mcnemar_b", "mcnemar_c", "mcnemar_p", "mcnemar_midp", "p_holm", "accuracy_diff", "diff_low", "diff_high",
    "detectable_diff",
)  # fmt: skip
# More rows than these are for a program to read.
_MOST = 150
_SAID = {"a better": "first better", "b better": "second better"}
_VERDICTS = ("a better", "b better", "not significant", "underpowered", "same answers")


def section(analysis: AnalysisFolder) -> Section | None:
    """The section; None where no two runs were scored on the same problems."""
    pairs = analysis.table("pairs", _TEXTS, _NUMBERS)
    pairs = pairs[pairs["mcnemar_p"].notna()]
    if pairs.empty:
        return None
    spread = _spread(analysis)
    return Section(
        "statistics",
        "Statistics",
        text=[_summary(analysis, pairs), *_detectable(pairs)],
        tables=[_table(analysis, pairs), *([spread] if spread else [])],
        notes=[
            "A run is named by its number in the table of runs, its rate, and the seeds of the data's order (s) "
            "and of the initial adapter (A).",
            "b, c: problems that only the first, only the second run has right (of several samples: more often right). "
            "p: McNemar's exact test on them; mid-p counts the observed table half. Holm: p corrected for the family.",
            "Underpowered: so few problems tell the two apart that no outcome of them, or none with a single contrary "
            "problem, could have passed Holm's first threshold. Then nothing is said about a difference.",
            "Detectable: the difference that the exact test at Holm's first threshold would find in four of five "
            "samples of as many problems, were the two runs to disagree as often as they do (– where none would be).",
            "Tests and intervals are about problems: they say nothing of other seeds.",
        ],
    )


def _summary(analysis: AnalysisFolder, pairs: pd.DataFrame) -> str:
    family = analysis.manifest.get("holm_family") or {}
    tests = int(pairs["p_holm"].notna().sum())
    counts = pairs["verdict"].value_counts()
    better = int(counts.get("a better", 0) + counts.get("b better", 0))
    said = [f"{better} differ{'s' * (better == 1)}"]
    said += [f"{counts[name]} {name}" for name in _VERDICTS[2:] if counts.get(name)]
    which = {"all": "all pairs", "reference": "the pairs with the reference"}.get(family.get("pairs", ""), "the family")
    benchmark = analysis.manifest.get("benchmark")
    on = f" on {benchmark}" if benchmark else ""
    return (
        f"{len(pairs)} pair{'s' * (len(pairs) != 1)} of runs{on}, each on the same problems. Holm's correction counts "
        f"{which}, {tests} test{'s' * (tests != 1)}: {', '.join(said)}."
    )


def _detectable(pairs: pd.DataFrame) -> list[str]:
    known = pairs["detectable_diff"].dropna()
    if known.empty:
        return []
    low, middle, high = known.min(), known.median(), known.max()
    return [
        f"To be found in four of five such samples, a difference would have to be {percent(middle)} in the median pair "
        f"({percent(low)} where two runs disagree least, {percent(high)} where they disagree most)."
    ]


def _table(analysis: AnalysisFolder, pairs: pd.DataFrame) -> Table:
    runs = analysis.table("runs", ("run", "label", "method"), ("learning_rate", "seed", "init_seed"))
    known = runs.drop_duplicates("run").reset_index(drop=True).reset_index(names="number").set_index("run", drop=False)
    reference = analysis.manifest.get("reference")
    caption = "Every pair of runs, the smallest p first"
    shown = pairs
    if len(pairs) > _MOST:
        shown = pairs[(pairs["run_a"] == reference) | (pairs["run_b"] == reference)]
        caption = f"The pairs with {reference}, the smallest p first; all {len(pairs)} are in pairs.csv"
    columns = [
        Column("first", numeric=False), Column("second", numeric=False), Column("difference"), Column("95% interval"),
        Column("b"), Column("c"), Column("p"), Column("mid-p"), Column("p (Holm)"), Column("verdict", numeric=False),
        Column("detectable"),
    ]  # fmt: skip
    rows = []
    for _, pair in shown.sort_values("mcnemar_p", kind="stable").iterrows():
        names = [_run(pair[run], known) for run in ("run_a", "run_b")]
        interval = f"{difference(pair['diff_low'])} … {difference(pair['diff_high'])}"
        cells = [
            *names, Cell(difference(pair["accuracy_diff"])), Cell(interval), Cell(whole(pair["mcnemar_b"])),
            Cell(whole(pair["mcnemar_c"])), Cell(p_value(pair["mcnemar_p"])), Cell(p_value(pair["mcnemar_midp"])),
            Cell(p_value(pair["p_holm"])),
            Cell(_SAID.get(pair["verdict"], pair["verdict"]) or NOTHING),
            Cell(percent(pair["detectable_diff"])),
        ]  # fmt: skip
        rows.append(Row(cells))
    return downloadable(analysis, "pairs", caption, columns, rows)


def _run(name: str, known: pd.DataFrame) -> Cell:
    """A run by its number in the table of runs, so that the row is no wider than a screen."""
    if name not in known.index:
        return Cell(name)
    run = known.loc[name]
    if pd.isna(run["seed"]):
        return Cell(f"{run['number']} {name}", colour=colour(run["method"]))
    seeds = f"{rate(run['learning_rate'])} s{whole(run['seed'])} A{whole(run['init_seed'])}"
    name = " ".join(part for part in (name_of(run["method"]), setting_of(run)) if part)
    return Cell(f"{run['number']} {name}", seeds, colour=colour(run["method"]))


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
                Cell(name_of(row["method"]), below=row["lr"], colour=colour(row["method"])),
                Cell(whole(row["seeds"])),
                Cell(percent(row["accuracy_mean"]), f"± {percent(row['accuracy_std'])}", row["benchmark"]),
                Cell(f"{percent(row['accuracy_min'])} … {percent(row['accuracy_max'])}"),
                Cell(number(row["norm_mean"]), f"± {number(row['norm_std'])}"),
            ]
        )
        for _, row in seeds.iterrows()
    ]
    return downloadable(analysis, "seeds", "Spread over seeds: mean ± standard deviation", columns, rows)
