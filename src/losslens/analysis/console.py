"""The main tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Column
from rich.text import Text

from losslens.plain_table import Table

# More runs than this fill more than a screen with their pairs, which are in pairs.csv.
_MOST_RUNS = 8


def show(
    runs: pd.DataFrame, pairs: pd.DataFrame, floors: pd.DataFrame, ablation: pd.DataFrame, left_out: Mapping[str, str]
) -> None:
    """Prints runs, cosines and pairs with their floors (of many runs: the arms), and what was left out."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(runs["run"]))}
    console.print(_runs(runs, numbers))
    if runs["run"].nunique() > _MOST_RUNS + 1:  # and the base
        console.print(_arms(ablation))
        print(f"{len(pairs)} pairs: pairs.csv")
    elif len(pairs):
        console.print(_cosines(runs, pairs, numbers))
        console.print(_pairs(pairs, numbers))
    for run in runs[runs["diverged"].fillna("").astype(bool)].itertuples():
        print(f"{run.run}: {run.diverged}")
    for floor in floors.itertuples():
        print(
            f"{floor.method} lr={floor.lr} at other seeds, {floor.initial} initial adapter ({floor.pairs} "
            f"pair{'s' * (floor.pairs > 1)}): cosine {_number(floor.cosine)}, smallest angle "
            f"{_degrees(floor.angle_min_left)} left, {_degrees(floor.angle_min_right)} right"
        )
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


def _arms(ablation: pd.DataFrame) -> Table:
    title = "arms, averaged over their runs (± over them; in brackets: unrelated updates; either loss at another order)"
    table = Table(
        "arm", "rate", "runs", "‖ΔW‖", "eff. rank", "cosine to SFT", "(null, floor)", "angle left", "(null, floor)",
        "barrier", "CKA last", "accuracy", "to the base", "p (Holm)", title=title, title_justify="left",
    )  # fmt: skip
    for _, row in ablation[ablation["same_as"] == ""].iterrows():
        others = ablation.loc[ablation["same_as"] == row["arm"], "lr"]
        lost = f" +{row['diverged']} diverged" * (row["diverged"] > 0) + f", {row['collapsed']} collapsed" * (
            row["collapsed"] > 0
        )
        table.add_row(
            " = ".join([row["arm"], *others]),
            f"{row['learning_rate']:g}",
            f"{row['seeds']}{lost}",
            f"{_number(row['norm'])} ± {_number(row['norm_std'])}",
            _number(row["effective_rank"], 1),
            f"{_number(row['cosine_to_sft'])} ± {_number(row['cosine_to_sft_std'])}",
            f"({_number(row['cosine_to_sft_null'])}, {_number(row['cosine_to_sft_floor'])})",
            _degrees(row["angle_min_left_to_sft"]),
            f"({_degrees(row['angle_min_left_to_sft_null'])}, {_degrees(row['angle_min_left_to_sft_floor'])})",
            _number(row["barrier_chord_to_sft"]),
            _number(row["cka_last_to_sft"], 4),
            f"{_percent(row['accuracy'])} ± {_percent(row['accuracy_std'])}",
            _percent(row["base_diff"]),
            _number(row["base_p_holm"]),
        )
    return table


def _runs(runs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    table = Table(
        "", Column("run", overflow="fold"), "what", "benchmark", "accuracy", "95% interval", "‖ΔW‖", "of ‖W0‖",
        "eff. rank", "drift of A", "off-principal (null)",
    )  # fmt: skip
    for _, row in runs.iterrows():
        table.add_row(
            str(numbers[row["run"]]),
            row["run"],
            Text(row["label"] if row["label"] != row["run"] else ""),
            "–" if pd.isna(row["benchmark"]) else row["benchmark"],
            _percent(row["accuracy"]),
            f"{_percent(row['ci_low'])} … {_percent(row['ci_high'])}",
            _number(row["norm"]),
            _percent(row["relative_norm"]),
            _number(row["effective_rank"], 1),
            _degrees(row["drift_max"]),
            f"{_percent(row['off_principal'])} ({_percent(row['off_principal_null'])})",
        )
    return table


def _cosines(runs: pd.DataFrame, pairs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    trained = runs[runs["method"] != "base"].drop_duplicates("run")
    cosines = {frozenset((pair.run_a, pair.run_b)): pair.cosine for pair in pairs.itertuples()}
    cosines |= {frozenset((row.run,)): 1.0 for row in trained.itertuples() if row.norm > 0}
    table = Table("", *(str(numbers[name]) for name in trained["run"]), title="cosine of ΔW", title_justify="left")
    for row in trained.itertuples():
        cells = [_number(cosines.get(frozenset((row.run, other)), float("nan"))) for other in trained["run"]]
        table.add_row(Text(f"{numbers[row.run]} {row.label}"), *cells)
    return table


def _pairs(pairs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    title = "pairs (in brackets: nothing in common but shapes, ranks and a shared A; the same methods at other seeds)"
    table = Table(title=title, title_justify="left")
    for heading in (
        "pair", "cosine", "(null, seeds)", "angle left", "(null, seeds)", "barrier", "CKA last", "Δ accuracy",
        "95% interval", "p (Holm)", "verdict",
    ):  # fmt: skip
        table.add_column(heading, no_wrap=True)
    for _, row in pairs.iterrows():
        a, b = str(numbers[row["run_a"]]), str(numbers[row["run_b"]])
        verdict = "–" if pd.isna(row["verdict"]) else row["verdict"]
        table.add_row(
            f"{a}–{b}",
            _number(row["cosine"]),
            f"({_number(row['cosine_null'])}, {_number(row['cosine_seeds'])})",
            _degrees(row["angle_min_left"]),
            f"({_degrees(row['angle_min_left_null'])}, {_degrees(row['angle_min_left_seeds'])})",
            _number(row["barrier_chord"]),
            _number(row["cka_last"], 4),
            _percent(row["accuracy_diff"]),
            f"{_percent(row['diff_low'])} … {_percent(row['diff_high'])}",
            _number(row["p_holm"]),
            {"a better": f"{a} better", "b better": f"{b} better"}.get(verdict, verdict),
        )
    return table


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1%}"


def _number(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"


def _degrees(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}°"
