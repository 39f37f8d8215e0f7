"""Index of the explorer: runs, arms, the pairs between them, layers and projections."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import pandas as pd
import pyarrow as pa

from losslens.report.loss_comparison import ComparedLoss, LossComparison
from losslens.report.names import loss_name, run_name
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import colour, loss_title

_LAYER = re.compile(r"^.*?\.(\d+)\.")
# The order of projections within a block; others follow by name.
_ORDER = ("q", "k", "v", "o", "gate", "up", "down")
_TEXTS = ("run", "label", "arm", "method", "lr", "diverged")
_NUMBERS = ("learning_rate", "rank", "seed", "init_seed")


@dataclass(frozen=True)
class Runs:
    """The runs whose updates were measured, and the arms that they belong to.

    Attributes:
        names: The names of the runs, as in the tables.
        facts: For each run, `name`, `label`, `method`, `loss`, `colour` and `symbol`.
        arms: For each arm, `label`, `method`, `colour` and the numbers of its `runs`.
        between: For every two compared arms, and each arm with itself: the numbers of the two arms, and of the pairs of
            runs by which they are compared.
        rows: The row of `arm_pairs.csv` of each entry of `between`.
    """

    names: list[str]
    facts: list[dict[str, Any]]
    arms: list[dict[str, Any]]
    between: list[tuple[int, int, list[int]]]
    rows: pd.DataFrame


@dataclass(frozen=True)
class Modules:
    """The adapted modules.

    Attributes:
        names: Names of the modules, as in the tables.
        layers: Layer numbers, ascending; −1 for modules outside the layers.
        projections: Names of the projections, such as `q`.
        at: The indices of the layer and projection of each module.
    """

    names: list[str]
    layers: list[int]
    projections: list[str]
    at: list[tuple[int, int]]


def find_runs(analysis: AnalysisFolder, pairs: pd.DataFrame) -> Runs:
    """Finds the runs of `pairs`, in the order of `runs.csv` and with the numbers of the Runs section.

    Args:
        analysis: The analysis.
        pairs: One row per pair, with `run_a` and `run_b`.
    """
    table = analysis.table("runs", _TEXTS, _NUMBERS)
    table = table.drop_duplicates("run", ignore_index=True).assign(number=lambda rows: rows.index)
    inits = table["init_seed"].nunique() > 1
    table = table[table["run"].isin({*pairs["run_a"], *pairs["run_b"]})].reset_index(drop=True)
    names = list(table["run"])
    comparison = LossComparison(analysis)
    facts = []
    for _, run in table.iterrows():
        look = comparison.looks.of(run["arm"], run["method"])
        facts.append(
            {
                "name": run["run"], "label": f"{'✕ ' * bool(run['diverged'])}{run_name(run, inits, whole_name=True)}",
                "method": loss_title(run["method"]), "loss": run["arm"], "colour": look.colour, "symbol": look.symbol,
            }
        )  # fmt: skip
    of_name = {name: place for place, name in enumerate(names)}
    losses = [loss for loss in comparison.losses if any(run in of_name for run in loss.runs)]
    arms = [
        {
            "label": _label(loss), "method": loss_title(loss.method), "colour": colour(loss.method),
            "runs": [of_name[run] for run in loss.runs if run in of_name],
        }
        for loss in losses
    ]  # fmt: skip
    number = {pair: place for place, pair in enumerate(zip(pairs["run_a"], pairs["run_b"], strict=True))}
    between, compared = [], []
    rows = comparison.arm_pairs
    places = {frozenset(ends): place for place, ends in enumerate(zip(rows["arm_a"], rows["arm_b"], strict=True))}
    for (a, one), (b, other) in combinations_with_replacement(enumerate(losses), 2):
        by = comparison.between(one, other)
        numbers = sorted(number[pair] for pair in zip(by["run_a"], by["run_b"], strict=True) if pair in number)
        if numbers:
            row = rows.iloc[places[frozenset((one.arm, other.arm))]]
            # In the order of `arm_pairs.csv`, so that signed differences keep their direction.
            first, second = (a, b) if row["arm_a"] == one.arm else (b, a)
            between.append((first, second, numbers))
            compared.append(row)
    return Runs(names, facts, arms, between, pd.DataFrame(compared, columns=rows.columns).reset_index(drop=True))


def _label(loss: ComparedLoss) -> str:
    """Returns the full name of a loss."""
    if math.isnan(loss.learning_rate):
        return loss.arm
    return loss_name(loss.method, loss.learning_rate, loss.arm.partition(" ")[2])


def find_modules(*tables: pa.Table) -> Modules:
    """Finds the modules in `tables`, split into layer and projection."""
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
