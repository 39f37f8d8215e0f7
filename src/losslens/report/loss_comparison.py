"""The losses of an analysis and the tabulated measures of every two of them; nothing is averaged here."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from losslens.measures import pair_measures
from losslens.report import names
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import PlotStyles, loss_title, plot_order

_RUN_TEXTS = ("run", "arm", "method", "lr", "diverged")
_RUN_NUMBERS = ("learning_rate", "rank", "seed", "init_seed", "norm")
_TEXTS = ("arm_a", "arm_b", "pairing", "repeat_kind", "cosine_verdict", "accuracy_verdict")
_NUMBERS = (
    "pairs",
    "repeats",
    "cosine_repeat_a",
    "cosine_repeat_b",
    "n",
    "accuracy_diff",
    "diff_low",
    "diff_high",
    "p",
    "p_holm",
    "equivalence_margin",
    "equivalent_within",
    "detectable_diff",
)
_OF_PAIRS = ("cosine", "barrier_chord", "barrier_chord_low", "barrier_chord_high", "cka_last")


@dataclass(frozen=True)
class ComparedLoss:
    """A loss as it was trained: an arm of the analysis, or an external adapter.

    Attributes:
        arm: Its name in the tables.
        method: Its method.
        lr: The name of its learning rate.
        learning_rate: The learning rate; NaN if unknown.
        name: Its displayed name: `DPO`, or `DPO 1e-3` if the method was trained at several rates.
        runs: Names of its runs that have a final adapter.
        diverged: Number of runs that diverged or collapsed.
    """

    arm: str
    method: str
    lr: str
    learning_rate: float
    name: str
    runs: tuple[str, ...]
    diverged: int = 0


@dataclass(frozen=True)
class LossPairValue:
    """A measure of two losses, or of a loss and its repeats, from `arm_pairs.csv`; NaN if unknown.

    Attributes:
        value: The mean over the pairs of runs by which the losses are compared.
        lowest: The smallest value over these pairs.
        highest: The largest value over these pairs.
        null: The value for two unrelated updates.
        level: The value if the two were the same loss: the ceiling for similarities, else the repeat level.
        relative: The ratio to the ceiling, or the excess over the repeat level.
        low: Lower end of the 95% interval of `relative`.
        high: Upper end of the 95% interval of `relative`.
        pairs: Number of pairs of runs.
        pairing: What the two runs of these pairs share.
        repeats: Smallest number of seeds of the two losses.
        verdict: The verdict on the cosine.
        own: The cosine repeats of the two losses, from which the ceiling is made.
        changed: What changed between two runs of one loss: `order`, `start`, `order and start`.
    """

    value: float = math.nan
    lowest: float = math.nan
    highest: float = math.nan
    null: float = math.nan
    level: float = math.nan
    relative: float = math.nan
    low: float = math.nan
    high: float = math.nan
    pairs: int = 0
    pairing: str = ""
    repeats: int = 0
    verdict: str = ""
    own: tuple[float, float] = (math.nan, math.nan)
    changed: str = ""

    @property
    def known(self) -> bool:
        """True if the measure has a value."""
        return not math.isnan(self.value)


class LossComparison:
    """The losses of an analysis and their pairs."""

    def __init__(self, analysis: AnalysisFolder) -> None:
        self._analysis = analysis

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row per run, without the base."""
        runs = self._analysis.table("runs", _RUN_TEXTS, _RUN_NUMBERS).drop_duplicates("run")
        return runs[runs["method"] != "base"].reset_index(drop=True)

    @cached_property
    def losses(self) -> list[ComparedLoss]:
        """The losses, ordered by learning rate (largest first) and then by method."""
        groups = [group for _, group in self.runs.groupby("arm", sort=False)]
        several = self.runs.groupby("method")["arm"].nunique()
        full = [_name(group.iloc[0], several[group.iloc[0]["method"]] > 1) for group in groups]
        losses = []
        for group, name in zip(groups, names.all_cut(full), strict=True):
            first, known = group.iloc[0], group[group["norm"].notna()]
            losses.append(
                ComparedLoss(
                    first["arm"], first["method"], first["lr"], first["learning_rate"], name, tuple(known["run"]),
                    int((group["diverged"] != "").sum()),
                )
            )  # fmt: skip
        rates = self.runs.groupby("arm")["learning_rate"].first().fillna(-1.0)
        return sorted(losses, key=lambda loss: (-rates[loss.arm], plot_order(loss.method), loss.arm))

    @cached_property
    def looks(self) -> PlotStyles:
        """The plot style of each loss, by arm."""
        return PlotStyles((loss.arm, loss.method) for loss in self.losses)

    @cached_property
    def arms(self) -> dict[str, str]:
        """The arm of each run."""
        return dict(zip(self.runs["run"], self.runs["arm"], strict=True))

    @cached_property
    def reference(self) -> ComparedLoss | None:
        """The loss that the others are compared with: that of the reference run, else SFT; None without either."""
        run = self._analysis.manifest.get("reference")
        references = [loss for loss in self.losses if run in loss.runs]
        return next(iter(references or [loss for loss in self.losses if loss.method == "sft"]), None)

    @property
    def others(self) -> list[ComparedLoss]:
        """All losses but the reference."""
        return [loss for loss in self.losses if loss is not self.reference]

    @cached_property
    def arm_pairs(self) -> pd.DataFrame:
        """One row for every two arms (including the base), and for each arm with itself."""
        columns = [
            f"{measure.name}{end}" for measure in pair_measures() for end in measure.endings if end != "_verdict"
        ]
        return self._analysis.table("arm_pairs", _TEXTS, (*_NUMBERS, *columns))

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per pair of runs, with the arm of each and their pairing."""
        return self._analysis.table("pairs", ("run_a", "run_b", "arm_a", "arm_b", "pairing"), _OF_PAIRS)

    def between(self, first: ComparedLoss, second: ComparedLoss) -> pd.DataFrame:
        """Returns the pairs of runs by which two losses, or a loss and itself, are compared."""
        rows = self.pairs.iloc[self._pairs.get(frozenset((first.arm, second.arm)), [])]
        return rows[rows["pairing"] == self.of("cosine", first, second).pairing]

    def of(self, measure: str, first: ComparedLoss, second: ComparedLoss) -> LossPairValue:
        """Returns a measure of two losses, or the repeat of one loss."""
        row = self._rows.get(frozenset((first.arm, second.arm)))
        if row is None or math.isnan(row[measure]):
            return LossPairValue()
        sides = "ab" if row["arm_a"] == first.arm else "ba"
        return LossPairValue(
            value=row[measure],
            lowest=row[f"{measure}_min"],
            highest=row[f"{measure}_max"],
            null=row.get(f"{measure}_null", math.nan),
            level=row.get(f"{measure}_ceiling", row.get(f"{measure}_repeat", math.nan)),
            relative=row.get(f"{measure}_relative", math.nan),
            low=row.get(f"{measure}_low", math.nan),
            high=row.get(f"{measure}_high", math.nan),
            pairs=int(row["pairs"]),
            pairing=row["pairing"],
            repeats=int(row["repeats"]),
            verdict=row["cosine_verdict"],
            own=(row[f"cosine_repeat_{sides[0]}"], row[f"cosine_repeat_{sides[1]}"]),
            changed=row["repeat_kind"],
        )

    @cached_property
    def _rows(self) -> dict[frozenset[str], dict[Hashable, Any]]:
        rows = self.arm_pairs.fillna({"pairs": 0, "repeats": 0}).to_dict("records")
        return {frozenset((row["arm_a"], row["arm_b"])): row for row in rows}

    @cached_property
    def _pairs(self) -> dict[frozenset[str], list[int]]:
        rows: dict[frozenset[str], list[int]] = {}
        for row, arms in enumerate(zip(self.pairs["arm_a"], self.pairs["arm_b"], strict=True)):
            rows.setdefault(frozenset(arms), []).append(row)
        return rows


def _name(run: pd.Series, several: bool) -> str:
    """Returns `SFT`, or `DPO 1e-3 beta=0.3` if the method has several arms; an external adapter keeps its name."""
    if run["arm"] == run["run"]:
        return run["run"] if pd.isna(run["learning_rate"]) or several else loss_title(run["method"])
    if not several:
        return loss_title(run["method"])
    return names.loss_name(run["method"], run["learning_rate"], run["arm"].partition(" ")[2])
