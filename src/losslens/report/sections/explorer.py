"""The explorer: two runs or two methods compared layer by layer and module by module."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from losslens.measures import function_measures
from losslens.report.components import Section
from losslens.report.explorer_data import Pairs, pack, pair_columns
from losslens.report.explorer_index import Runs, find_modules, find_runs
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import AGAINST, ALONG, figure, logarithmic

_HOW_TO_READ = (
    "Choose two methods or runs, then a layer and a projection. Read each number between two others: the null, which "
    "two updates with nothing in common would show, and the ceiling (of a cosine) or repeat level (of an angle), which "
    "two runs of the same loss would show. Ceiling and repeat level are known only for losses trained at several "
    "seeds, and hold for pairs of different seeds, because runs of the same seed share their batches."
)


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without a pair of runs or without their modules."""
    table = analysis.table("pairs", ("run_a", "run_b", "pairing"), tuple(pair_columns()))
    modules = find_modules(analysis.parquet("run_modules", ["module"]), analysis.parquet("modules", ["module"]))
    if table.empty or not modules.names:
        return None
    runs = find_runs(analysis, table)
    table = table[table[["run_a", "run_b"]].isin(runs.names).all(axis=1)].reset_index(drop=True)
    if table.empty:
        return None
    number = {name: place for place, name in enumerate(runs.names)}
    ends = [(number[a], number[b]) for a, b in zip(table["run_a"], table["run_b"], strict=True)]
    packed, notes = pack(analysis, runs, modules, Pairs(table, ends))
    look = figure("", "", 10).update_layout(logarithmic("yaxis")).layout.to_plotly_json()
    ticks = {name: look["yaxis"].pop(name) for name in ("tickvals", "ticktext")}
    del look["template"], look["yaxis"]["type"]
    packed.add_header(layout=look, ticks=ticks, against=AGAINST, along=ALONG)
    packed.add_header(start={"runs": _first_pair(runs, table, ends), "arms": _first_arms(runs)})
    key = legend_of(LossComparison(analysis), (fact["loss"] for fact in runs.facts), lines=False)
    return Section("explore", "Explore", text=[_HOW_TO_READ], explorer=packed.text(), key=key, notes=notes)


def _first_pair(runs: Runs, table: pd.DataFrame, ends: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the pair of runs shown first: two losses with the same seeds and initial adapter.

    Prefers pairs with the most measures, and SFT against DPO if both were trained.
    """

    def interest(place: int) -> tuple[bool, bool, bool, int, int]:
        a, b = ends[place]
        pairing = table.loc[place, "pairing"]
        apart = runs.facts[a]["loss"] != runs.facts[b]["loss"]
        measured = int(table.loc[place, [measure.name for measure in function_measures()]].notna().sum())
        wanted = len({runs.facts[run]["method"] for run in ends[place]} & {"SFT", "DPO"})
        return apart and pairing == "same seeds", pairing in ("same seeds", "same init"), apart, measured, wanted

    a, b = ends[max(range(len(ends)), key=interest)]
    return (b, a) if runs.facts[b]["method"] == "SFT" != runs.facts[a]["method"] else (a, b)


def _first_arms(runs: Runs) -> tuple[int, int] | None:
    """Returns the pair of arms shown first; None if every arm has a single run."""
    apart = [(a, b) for a, b, _ in runs.between if a != b]
    if not apart or all(len(arm["runs"]) == 1 for arm in runs.arms):
        return None
    a, b = max(apart, key=lambda pair: len({runs.arms[arm]["method"] for arm in pair} & {"SFT", "DPO"}))
    return (b, a) if runs.arms[b]["method"] == "SFT" != runs.arms[a]["method"] else (a, b)
