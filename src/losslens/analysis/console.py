"""Prints the main tables to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import pandas as pd
from rich.console import Console
from rich.table import Column
from rich.text import Text

from losslens.core.terminal import Table
from losslens.measures import Measure, PairMeasure, get_measure, measures_besides_cosine, pair_measures, run_measures

# Most arms whose pairs are printed; more would fill more than a screen.
_MOST_ARMS = 8


def show(
    runs: pd.DataFrame, arm_pairs: pd.DataFrame, arm_table: pd.DataFrame, tuning: pd.DataFrame,
    left_out: Mapping[str, str],
) -> None:  # fmt: skip
    """Prints the runs, the arms (if one has several runs), their pairs, the chosen rates, and what was left out."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(runs["run"]))}
    console.print(_runs(runs, numbers))
    arms = list(dict.fromkeys(runs.loc[runs["method"] != "base", "arm"]))
    if len(arms) > _MOST_ARMS or (arm_table["seeds"] > 1).any():
        console.print(_arms(arm_table))
    if len(arms) > _MOST_ARMS:
        print(f"{len(arm_pairs)} pairs of arms: arm_pairs.csv")
    elif len(arm_pairs):
        console.print(_cosines(arms, arm_pairs))
        console.print(_directions(arms, arm_pairs))
        if arm_pairs["accuracy_diff"].notna().any():
            console.print(_accuracies(arms, arm_pairs))
    if len(tuning):
        console.print(_chosen_rates(tuning))
    own = dict.fromkeys(arm_table.loc[(arm_table["samples"] == "own") & (arm_table["alias_of"] == ""), "arm"])
    if own:
        print(f"trained on rows of their own (samples of their policy): {', '.join(own)}")
    for run in runs[runs["diverged"].notna() & (runs["diverged"] != "")].itertuples():
        print(f"{run.run}: {run.diverged}")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


def _arms(arm_table: pd.DataFrame) -> Table:
    title = "arms: mean ± standard deviation over runs (in brackets: null; ceiling or repeat level)"
    table = Table(
        "arm", "rate", "runs", *(measure.heading for measure in run_measures("main")),
        *(f"{measure.heading} to SFT" for measure in pair_measures("main")), "accuracy", "vs base", "p (Holm)",
        title=title, title_justify="left",
    )  # fmt: skip
    for _, row in arm_table[arm_table["alias_of"] == ""].iterrows():
        others = arm_table.loc[arm_table["alias_of"] == row["arm"], "lr"]
        lost = f" +{row['diverged']} diverged" * (row["diverged"] > 0) + f", {row['collapsed']} collapsed" * (
            row["collapsed"] > 0
        )
        table.add_row(
            " = ".join([row["arm"], *others]), f"{row['learning_rate']:g}", f"{row['seeds']}{lost}",
            *(f"{_shown(m, row[m.name])} ± {_shown(m, row[f'{m.name}_std'])}" for m in run_measures("main")),
            *(_with_levels(measure, row, f"{measure.name}_to_sft") for measure in pair_measures("main")),
            f"{_percent(row['accuracy'])} ± {_percent(row['accuracy_std'])}", _percent(row["base_diff"]),
            _number(row["base_p_holm"]),
        )  # fmt: skip
    return table


def _chosen_rates(tuning: pd.DataFrame) -> Table:
    first = tuning.iloc[0]
    title = f"best learning rates, chosen on {first['select_on']} and reported on {first['benchmark']}"
    table = Table(
        "loss", "chosen at", "rate", "maybe", "score to choose by", "accuracy", title=title, title_justify="left"
    )
    for _, row in tuning[tuning["chosen"]].iterrows():
        same = (tuning["loss"] == row["loss"]) & (tuning["rule"] == row["rule"])
        others = tuning.loc[same & tuning["may_be_best"] & ~tuning["chosen"], "learning_rate"]
        at_edge = " (end of the grid)" * bool(row["at_edge"])
        on = "" if pd.isna(row["reported_on"]) else f" ({row['reported_on']})"
        table.add_row(
            row["loss"], row["rule"], f"{row['learning_rate']:g}{at_edge}", ", ".join(f"{rate:g}" for rate in others),
            _percent(row["validation"]), f"{_percent(row['accuracy'])}{on}",
        )  # fmt: skip
    return table


def _runs(runs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    benchmarks = runs["benchmark"].dropna().unique()
    several = len(benchmarks) > 1
    table = Table(
        "", Column("run", overflow="fold"), "what", *["benchmark"] * several, "accuracy", "95% interval",
        *(f"{measure.heading}{' (null)' * (measure.null is not None)}" for measure in run_measures("more")),
        title=f"runs, scored on {benchmarks[0]}" if len(benchmarks) == 1 else None, title_justify="left",
    )  # fmt: skip
    for _, row in runs.iterrows():
        table.add_row(
            str(numbers[row["run"]]), row["run"], Text(row["label"] if row["label"] != row["run"] else ""),
            *["–" if pd.isna(row["benchmark"]) else row["benchmark"]] * several, _percent(row["accuracy"]),
            f"{_percent(row['ci_low'])} … {_percent(row['ci_high'])}",
            *(_with_levels(measure, row, measure.name) for measure in run_measures("more")),
        )  # fmt: skip
    return table


def _cosines(arms: Sequence[str], arm_pairs: pd.DataFrame) -> Table:
    cosines = {frozenset((pair.arm_a, pair.arm_b)): pair.cosine for pair in arm_pairs.itertuples()}
    title = "cosine of ΔW (on the diagonal: the repeat of each loss)"
    table = Table("", *map(str, range(1, len(arms) + 1)), title=title, title_justify="left")
    for number, arm in enumerate(arms, start=1):
        cells = [_number(cosines.get(frozenset((arm, other)), float("nan"))) for other in arms]
        table.add_row(Text(f"{number} {arm}"), *cells)
    return table


def _directions(arms: Sequence[str], arm_pairs: pd.DataFrame) -> Table:
    title = "pairs of arms, by runs of different seeds if any (ceiling, repeat: the value if both were the same loss)"
    table = Table(title=title, title_justify="left")
    cosine, others = get_measure("cosine"), measures_besides_cosine("main")
    assert isinstance(cosine, PairMeasure)
    for heading in ("pair", "by", _heading(cosine), "relative", "verdict", *map(_heading, others)):
        table.add_column(heading)
    measured = arm_pairs[arm_pairs["pairing"].notna() & (arm_pairs["arm_a"] != arm_pairs["arm_b"])]
    for _, row in measured.iterrows():
        table.add_row(
            _pair(arms, row), row["pairing"] or "–", _with_levels(cosine, row, cosine.name), _relative(row, "cosine"),
            row["cosine_verdict"], *(_with_levels(measure, row, measure.name) for measure in others),
        )  # fmt: skip
    return table


def _accuracies(arms: Sequence[str], arm_pairs: pd.DataFrame) -> Table:
    table = Table("pair", "Δ accuracy", "95% interval", "p (Holm)", "verdict")
    for _, row in arm_pairs[arm_pairs["accuracy_diff"].notna()].iterrows():
        verdict = "–" if pd.isna(row["accuracy_verdict"]) else row["accuracy_verdict"]
        table.add_row(
            _pair(arms, row),
            _percent(row["accuracy_diff"]),
            f"{_percent(row['diff_low'])} … {_percent(row['diff_high'])}",
            _number(row["p_holm"]),
            f"{_number_of(arms, row['arm_a'])} {verdict}" if verdict in ("better", "worse") else verdict,
        )
    return table


def _pair(arms: Sequence[str], row: pd.Series) -> str:
    return f"{_number_of(arms, row['arm_a'])}–{_number_of(arms, row['arm_b'])}"


def _number_of(arms: Sequence[str], arm: str) -> str:
    """Returns the number of an arm in the table of cosines; the base keeps its name."""
    return str(arms.index(arm) + 1) if arm in arms else arm


def _relative(row: pd.Series, measure: str) -> str:
    """Formats the ratio to the ceiling with its interval, if any: `0.83 [0.74, 0.91]`."""
    relative, low, high = (row[f"{measure}_{end}"] for end in ("relative", "low", "high"))
    return _number(relative, 2) + ("" if pd.isna(low) else f" [{_number(low, 2)}, {_number(high, 2)}]")


def _percent(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.1%}"


def _number(value: float, digits: int = 3) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def _heading(measure: PairMeasure) -> str:
    """Returns `cosine (null, ceiling)`."""
    return f"{measure.heading} ({'null, ' * measure.has_null}{measure.level})"


def _with_levels(measure: Measure, row: pd.Series, name: str) -> str:
    """Returns `0.302 (0.022, 0.317)`: the value, with its null and its ceiling or repeat level in brackets."""
    levels = [row[f"{name}_{end}"] for end in ("null", "ceiling", "repeat") if not pd.isna(row.get(f"{name}_{end}"))]
    return _shown(measure, row[name]) + f" ({', '.join(_shown(measure, value) for value in levels)})" * bool(levels)


def _shown(measure: Measure, value: float) -> str:
    """Formats a value with an ASCII minus sign, for programs that read the output."""
    return measure.show(value).replace("−", "-")
