"""The main tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Column, Table

# More pairs than this fill a screen; they are in pairs.csv.
_MOST_PAIRS = 28


def show(
    runs: pd.DataFrame, pairs: pd.DataFrame, floors: pd.DataFrame, left_out: Mapping[str, str], folder: Path
) -> None:
    """Prints runs, cosines and pairs with their floors, what was left out, and where everything lies."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(runs["run"]))}
    console.print(_runs(runs, numbers))
    if len(pairs):
        console.print(_cosines(runs, pairs, numbers))
        console.print(_pairs(pairs.head(_MOST_PAIRS), numbers))
    if len(pairs) > _MOST_PAIRS:
        print(f"{len(pairs) - _MOST_PAIRS} more pairs: pairs.csv")
    for floor in floors.itertuples():
        print(
            f"floor: {floor.method} at other seeds, {floor.initial} initial adapter ({floor.pairs} pairs): cosine "
            f"{_number(floor.cosine)}, smallest angle {_number(floor.angle_min_left, 1)}° left, "
            f"{_number(floor.angle_min_right, 1)}° right"
        )
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(folder)


def _runs(runs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    table = Table(
        "", Column("run", overflow="fold"), "benchmark", "accuracy", "95% interval", "‖ΔW‖", "/‖W0‖", "eff. rank",
        "drift of A", "off-principal",
    )  # fmt: skip
    for _, row in runs.iterrows():
        table.add_row(
            str(numbers[row["run"]]),
            row["run"],
            "–" if pd.isna(row["benchmark"]) else row["benchmark"],
            _percent(row["accuracy"]),
            f"{_percent(row['ci_low'])} … {_percent(row['ci_high'])}",
            _number(row["norm"]),
            _percent(row["relative_norm"]),
            _number(row["effective_rank"], 1),
            _degrees(row["drift_max"]),
            _percent(row["off_principal"]),
        )
    return table


def _cosines(runs: pd.DataFrame, pairs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    trained = runs[runs["method"] != "base"].drop_duplicates("run")
    cosines = {frozenset((pair.run_a, pair.run_b)): pair.cosine for pair in pairs.itertuples()}
    title = f"cosine of ΔW; of unrelated updates below {_number(pairs['cosine_null'].max())}"
    table = Table("", *(str(numbers[name]) for name in trained["run"]), title=title, title_justify="left")
    for name, method in zip(trained["run"], trained["method"], strict=True):
        cells = [_number(cosines.get(frozenset((name, other)), 1.0)) for other in trained["run"]]
        table.add_row(f"{numbers[name]} {method}", *cells)
    return table


def _pairs(pairs: pd.DataFrame, numbers: Mapping[str, int]) -> Table:
    title = (
        "pairs (in brackets: the same method at other seeds); "
        f"smallest angle of unrelated subspaces {_number(pairs['angle_min_left_null'].min(), 1)}°"
    )
    table = Table(title=title, title_justify="left")
    for heading in (
        "pair", "cosine", "(seeds)", "angle", "(seeds)", "barrier", "CKA", "accuracy", "95% interval", "p", "verdict",
    ):  # fmt: skip
        table.add_column(heading, no_wrap=True)
    for _, row in pairs.iterrows():
        kind = "shared" if row["shared_initial"] is True else "independent"
        a, b = str(numbers[row["run_a"]]), str(numbers[row["run_b"]])
        verdict = "–" if pd.isna(row["verdict"]) else row["verdict"]
        table.add_row(
            f"{a}–{b}",
            _number(row["cosine"]),
            _number(row[f"cosine_seed_{kind}"]),
            _degrees(row["angle_min_left"]),
            _degrees(row[f"angle_min_left_seed_{kind}"]),
            _number(row["barrier_chord"]),
            _number(row["cka_last"]),
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
