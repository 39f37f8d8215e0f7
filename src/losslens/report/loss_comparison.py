"""Who is compared on the page: the losses, and what the tables say of every two of them. Nothing is averaged here."""

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
    "detectable_diff",
)
_OF_PAIRS = ("cosine", "barrier_chord", "barrier_chord_low", "barrier_chord_high", "cka_last")


@dataclass(frozen=True)
class Loss:
    """One loss as it was trained: an arm of the analysis, or an adapter made elsewhere.

    Attributes:
        arm: Its name in the tables.
        method: Its method.
        lr: The name of its learning rate.
        learning_rate: The rate; NaN where it is not known.
        name: What a reader calls it: `DPO`, or `DPO 1e-3` where the method is there at several rates.
        runs: Names of its runs, those without an end left out.
        diverged: How many have none, or have fallen to nothing.
    """

    arm: str
    method: str
    lr: str
    learning_rate: float
    name: str
    runs: tuple[str, ...]
    diverged: int = 0


@dataclass(frozen=True)
class Compared:
    """A measure of two losses, or of a loss and itself, as `arm_pairs.csv` has it; NaN is what is not known.

    Attributes:
        value: The mean over the pairs of runs by which they are compared.
        lowest: The smallest of these.
        highest: The largest.
        null: What unrelated updates show.
        level: What they would show if they were one loss: the ceiling of a similarity, the repeat level of others.
        relative: The ratio to the ceiling, or the excess over the repeat level.
        low: Of its 95% interval.
        high: Of its 95% interval.
        pairs: How many pairs of runs.
        pairing: What these share.
        repeats: How many seeds each loss has at least.
        verdict: What the cosine says.
        own: The cosine that each of the two has with itself, by which the ceiling is made.
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
        """Whether there is anything to show."""
        return not math.isnan(self.value)


class Comparison:
    """The losses of an analysis and their pairs."""

    def __init__(self, analysis: AnalysisFolder) -> None:
        self._analysis = analysis

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row a run, the base left out."""
        runs = self._analysis.table("runs", _RUN_TEXTS, _RUN_NUMBERS).drop_duplicates("run")
        return runs[runs["method"] != "base"].reset_index(drop=True)

    @cached_property
    def losses(self) -> list[Loss]:
        """The losses: by learning rate, the largest first, and then in the order in which methods are shown."""
        groups = [group for _, group in self.runs.groupby("arm", sort=False)]
        several = self.runs.groupby("method")["arm"].nunique()
        full = [_name(group.iloc[0], several[group.iloc[0]["method"]] > 1) for group in groups]
        losses = []
        for group, name in zip(groups, names.all_cut(full), strict=True):
            first, known = group.iloc[0], group[group["norm"].notna()]
            losses.append(
                Loss(
                    first["arm"], first["method"], first["lr"], first["learning_rate"], name, tuple(known["run"]),
                    int((group["diverged"] != "").sum()),
                )
            )  # fmt: skip
        rates = self.runs.groupby("arm")["learning_rate"].first().fillna(-1.0)
        return sorted(losses, key=lambda loss: (-rates[loss.arm], plot_order(loss.method), loss.arm))

    @cached_property
    def looks(self) -> PlotStyles:
        """The look of each loss, by its arm."""
        return PlotStyles((loss.arm, loss.method) for loss in self.losses)

    @cached_property
    def arms(self) -> dict[str, str]:
        """The arm of each run."""
        return dict(zip(self.runs["run"], self.runs["arm"], strict=True))

    @cached_property
    def reference(self) -> Loss | None:
        """The loss that the others are held against: that of the analysis' reference, else SFT; None without either."""
        named = self._analysis.manifest.get("reference")
        found = [loss for loss in self.losses if named in loss.runs]
        return next(iter(found or [loss for loss in self.losses if loss.method == "sft"]), None)

    @property
    def others(self) -> list[Loss]:
        """All but the reference."""
        return [loss for loss in self.losses if loss is not self.reference]

    @cached_property
    def arm_pairs(self) -> pd.DataFrame:
        """One row for every two arms, the base among them, and for each arm and itself."""
        columns = [
            f"{measure.name}{end}" for measure in pair_measures() for end in measure.endings if end != "_verdict"
        ]
        return self._analysis.table("arm_pairs", _TEXTS, (*_NUMBERS, *columns))

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row a pair of runs, with the arms of both and what they share."""
        return self._analysis.table("pairs", ("run_a", "run_b", "arm_a", "arm_b", "pairing"), _OF_PAIRS)

    def between(self, first: Loss, second: Loss) -> pd.DataFrame:
        """The pairs of runs by which two losses are compared, or a loss with itself."""
        rows = self.pairs.iloc[self._pairs.get(frozenset((first.arm, second.arm)), [])]
        return rows[rows["pairing"] == self.of("cosine", first, second).pairing]

    def of(self, measure: str, first: Loss, second: Loss) -> Compared:
        """A measure of two losses, or of a loss with itself, trained again."""
        row = self._rows.get(frozenset((first.arm, second.arm)))
        if row is None or math.isnan(row[measure]):
            return Compared()
        sides = "ab" if row["arm_a"] == first.arm else "ba"
        return Compared(
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
        found: dict[frozenset[str], list[int]] = {}
        for place, arms in enumerate(zip(self.pairs["arm_a"], self.pairs["arm_b"], strict=True)):
            found.setdefault(frozenset(arms), []).append(place)
        return found


def _name(run: pd.Series, several: bool) -> str:
    """`SFT`; `DPO 1e-3`, `DPO 1e-3 beta=0.3` where the method is there several times; of an adapter its own name."""
    if run["arm"] == run["run"]:
        return run["run"] if pd.isna(run["learning_rate"]) or several else loss_title(run["method"])
    if not several:
        return loss_title(run["method"])
    return names.loss_name(run["method"], run["learning_rate"], run["arm"].partition(" ")[2])
