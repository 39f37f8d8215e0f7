"""What was compared, as the explorer names it: runs, arms and the pairs between them, layers and projections."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from losslens.report.comparison import Comparison
from losslens.report.folder import AnalysisFolder
from losslens.report.names import of_loss, of_run
from losslens.report.style import colour, name_of, place_of

_LAYER = re.compile(r"^.*?\.(\d+)\.")
# As a block reads its input; what is not among them comes after, by name.
_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_TEXTS = ("run", "label", "arm", "method", "lr", "diverged")
_NUMBERS = ("learning_rate", "rank", "seed", "init_seed")


@dataclass(frozen=True)
class Runs:
    """The runs whose updates were measured, and the arms that they belong to.

    Attributes:
        names: Of the runs, as the tables have them.
        facts: Of each run what the page shows: `name`, `label`, `method`, `loss`, `colour`, `symbol`.
        seeds: `seed` and `init_seed` of each run.
        arms: Of each arm `label`, `method`, `colour` and the numbers of its `runs`; none where every arm is one run.
    """

    names: list[str]
    facts: list[dict[str, Any]]
    seeds: list[tuple[float, float]]
    arms: list[dict[str, Any]]

    def between(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, list[int]]]:
        """Which of `pairs` two arms are compared by: those of the same seeds; else of one initial adapter; else all.

        An arm is compared with itself by its runs in different orders of the data from one initial adapter, or, where
        there are none, by all.
        """
        number = {frozenset(pair): place for place, pair in enumerate(pairs)}
        found = []
        for (a, one), (b, other) in combinations_with_replacement(enumerate(self.arms), 2):
            every = [pair for pair in product(one["runs"], other["runs"]) if frozenset(pair) in number]
            shared = [pair for pair in every if self.seeds[pair[0]][1] == self.seeds[pair[1]][1]]
            like = [pair for pair in shared if a != b and self.seeds[pair[0]][0] == self.seeds[pair[1]][0]]
            numbers = sorted({number[frozenset(pair)] for pair in like or shared or every})
            if numbers:
                found.append((a, b, numbers))
        return found


@dataclass(frozen=True)
class Modules:
    """The adapted modules.

    Attributes:
        names: As the tables have them.
        layers: Numbers of the layers, ascending; −1 for what lies outside of them.
        projections: Names, such as `q`.
        at: Layer and projection of each module, as places in those two.
    """

    names: list[str]
    layers: list[int]
    projections: list[str]
    at: list[tuple[int, int]]


def find_runs(analysis: AnalysisFolder, measured: Iterable[str]) -> Runs:
    """The runs named `measured`, in the order of `runs.csv`, numbered as the page's section of runs numbers them."""
    table = analysis.table("runs", _TEXTS, _NUMBERS)
    settings = (
        analysis.table("trajectories", ("run", "settings"), ()).drop_duplicates("run").set_index("run")["settings"]
    )
    table = table.drop_duplicates("run", ignore_index=True).assign(number=lambda rows: rows.index)
    table["settings"] = table["run"].map(settings.to_dict()).astype(object).fillna("")
    unlisted = [name for name in dict.fromkeys(measured) if name not in set(table["run"])]
    inits = table["init_seed"].nunique() > 1
    table = table[table["run"].isin(set(measured))].reset_index(drop=True)
    names = [*table["run"], *unlisted]
    comparison = Comparison(analysis)
    methods = dict(zip(table["run"], table["method"], strict=True))
    labels = {
        row["run"]: f"{'✕ ' * bool(row['diverged'])}{of_run(row, inits, whole_name=True)}"
        for _, row in table.iterrows()
    }
    facts = []
    for name in names:
        method, loss = methods.get(name, ""), comparison.arms.get(name, name)
        look = comparison.looks.of(loss, method)
        facts.append(
            {
                "name": name, "label": labels.get(name, name), "method": name_of(method), "loss": loss,
                "colour": look.colour, "symbol": look.symbol,
            }
        )  # fmt: skip
    seeds = [(row.seed, row.init_seed) for row in table.itertuples()] + [(np.nan, np.nan)] * len(unlisted)
    return Runs(names, facts, seeds, _arms(table, seeds))


def _arms(table: pd.DataFrame, seeds: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    """The arms; an analysis without the column `arm` has those whose runs differ in their seeds and nothing known."""
    keys = ["arm"] if (table["arm"] != "").any() else ["method", "lr", "learning_rate", "rank", "settings"]
    elsewhere = table["learning_rate"].isna()
    groups = [rows for _, rows in table[~elsewhere].groupby(keys, sort=False, dropna=False)]
    groups.sort(key=lambda rows: (-rows["learning_rate"].iloc[0], place_of(rows["method"].iloc[0])))
    groups += [table.loc[[run]] for run in table.index[elsewhere]]
    arms = []
    for rows in groups:
        first = rows.iloc[0]
        setting = first["arm"].partition(" ")[2] or first["settings"]
        known = of_loss(first["method"], first["learning_rate"], setting)
        method = first["method"]
        label = first["run"] if np.isnan(first["learning_rate"]) else known
        arms.append({"label": label, "method": name_of(method), "colour": colour(method), "runs": rows.index.tolist()})
    told_apart = len({arm["label"] for arm in arms}) == len(arms)
    repeated = any(len({seeds[run] for run in arm["runs"]}) < len(arm["runs"]) for arm in arms)
    return arms if told_apart and not repeated and any(len(arm["runs"]) > 1 for arm in arms) else []


def find_modules(*tables: pa.Table) -> Modules:
    """The modules that `tables` have rows of, taken apart into layer and projection."""
    columns = [table["module"].unique().to_pylist() for table in tables if "module" in table.column_names]
    names = list(dict.fromkeys(name for column in columns for name in column))
    matches = [_LAYER.match(name) for name in names]
    layers = [int(match[1]) if match else -1 for match in matches]
    rests = [name[match.end() :] if match else name for name, match in zip(names, matches, strict=True)]
    brief = {rest: rest.rpartition(".")[2].removesuffix("_proj") for rest in rests}
    if len(set(brief.values())) < len(brief):  # experts, or two attentions in one layer
        brief = {rest: rest for rest in rests}
    rank = {name: place for place, name in enumerate(_ORDER)}
    projections = sorted(set(brief.values()), key=lambda name: (rank.get(name, len(rank)), name))
    known = sorted(set(layers))
    at = [(known.index(layer), projections.index(brief[rest])) for layer, rest in zip(layers, rests, strict=True)]
    return Modules(names, known, projections, at)
