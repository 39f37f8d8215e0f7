"""The adapters that the authors of arXiv 2606.23740 published, beside the figures of their paper."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from losslens.tables.analysis_folder import AnalysisFolder

# The figures, each with the losses that it is about, as the paper gives them.
_PAPER: Mapping[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
REPOSITORY: str = _PAPER["repository"]

_LOSS = re.compile(r"(?<![a-z])(online[-_ ]?grpo|offline[-_ ]?grpo|grpo|dapo|rift|rft|sft|dft|dpo)(?![a-z])")
_RATE = re.compile(r"(?<![a-z])lr[-_=]?(\d+(?:\.\d+)?e-?\d+|\d*\.\d+)")
_SEED = re.compile(r"(?<![a-z])s(?:eed)?[-_=]?(\d+)(?![a-z0-9.])")
# On-policy methods were trained at one rate and seed, which their names may leave out.
_ON_POLICY = ("online_grpo", "dapo")


@dataclass(frozen=True)
class Training:
    """Training of an adapter, as far as its name says it.

    Attributes:
        loss: The loss, by its name in LossLens; empty if the name has none or several.
        learning_rate: The peak learning rate; NaN if unknown.
        seed: The seed; None if unknown.
    """

    loss: str
    learning_rate: float
    seed: int | None

    @property
    def is_compared(self) -> bool:
        """True if the paper's figures are about it: seed 42 at the conventional rate of its loss."""
        expected = _PAPER["learning_rate"].get(self.loss, _PAPER["learning_rate"]["others"])
        unknown = math.isnan(self.learning_rate) and self.seed is None
        return (math.isclose(self.learning_rate, expected) and self.seed == _PAPER["seed"]) or (
            unknown and self.loss in _ON_POLICY
        )


def training_of(name: str) -> Training:
    """Reads the loss, the rate and the seed from the name of an adapter, such as `sft-lr5e-6_s42`."""
    lower = name.lower()
    losses = {re.sub(r"^offline_", "", re.sub(r"[- ]|(?<=online)(?=grpo)|(?<=offline)(?=grpo)", "_", found))
              for found in _LOSS.findall(lower)}  # fmt: skip
    rate, seed = _RATE.search(lower), _SEED.search(lower)
    return Training(
        losses.pop() if len(losses) == 1 else "",
        float(rate[1]) if rate else math.nan,
        int(seed[1]) if seed else None,
    )


def write_published(folder: Path) -> Path:
    """Writes `published.csv` into the folder of an analysis: the paper's figures beside those of its adapters.

    Returns:
        The path of a table with a row per figure: `measure`, the losses `first` and `second` (empty for a measure of
        one update), the figure as a range `paper_low` to `paper_high`, `here`, `difference` (0 inside the range),
        and `adapters`, the names of the adapters, or why there are none.
    """
    analysis = AnalysisFolder(folder)
    names = list(dict.fromkeys(str(figure["measure"]) for figure in _PAPER["figures"]))
    values: dict[tuple[frozenset[str], str], float] = {}
    for table, keys in (("runs", ("run",)), ("pairs", ("run_a", "run_b"))):
        for _, row in analysis.table(table, keys, names).iterrows():
            values |= {(frozenset(row[list(keys)]), name): row[name] for name in names}
    by_loss: dict[str, list[str]] = {}
    for run in analysis.table("runs", ("run",), ())["run"]:
        if (training := training_of(run)).is_compared:
            by_loss.setdefault(training.loss, []).append(run)
    rows = [_row(figure, by_loss, values) for figure in _PAPER["figures"]]
    return analysis.add_table("published", pd.DataFrame(rows))


def _row(
    figure: Mapping[str, Any],
    by_loss: Mapping[str, Sequence[str]],
    values: Mapping[tuple[frozenset[str], str], float],
) -> dict[str, Any]:
    losses, low, high = figure["losses"], float(figure["low"]), float(figure["high"])
    lacking = next((loss for loss in losses if len(by_loss.get(loss, ())) != 1), None)
    here, said = math.nan, ""
    if lacking is None:
        adapters = [by_loss[loss][0] for loss in losses]
        here, said = values.get((frozenset(adapters), figure["measure"]), math.nan), ", ".join(adapters)
    else:
        found = by_loss.get(lacking, ())
        said = f"several adapters are {lacking}: {', '.join(found)}" if found else f"no adapter is {lacking}"
    return {
        "measure": figure["measure"], "first": losses[0], "second": losses[1] if len(losses) > 1 else "",
        "paper_low": low, "paper_high": high, "here": here,
        "difference": here - min(max(here, low), high) if not math.isnan(here) else math.nan, "adapters": said,
    }  # fmt: skip
