"""Who is compared on the page: runs that differ in their seeds only are one loss, and are averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from losslens.report import names
from losslens.report.folder import AnalysisFolder
from losslens.report.style import Looks, name_of, place_of

_RUN_TEXTS = ("run", "arm", "method", "lr", "diverged")
_RUN_NUMBERS = ("learning_rate", "rank", "seed", "init_seed", "norm")
# Of pairs of runs: what is averaged over the pairs of two losses.
MEASURES = (
    "cosine", "u1", "v1", "angle_min_left", "angle_max_left", "angle_min_right", "angle_max_right",
    "barrier_chord", "cka_last",
)  # fmt: skip
_NULLS = tuple(f"{measure}_null" for measure in MEASURES[:7])
_BESIDE = ("barrier_chord_low", "barrier_chord_high", "p_holm")


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
class Average:
    """A measure over the pairs of two losses.

    Attributes:
        value: The mean.
        std: The standard deviation over pairs; NaN for a single one.
        null: The mean of what unrelated updates show; NaN where that is not known.
        pairs: How many pairs.
        of: Of a floor: the losses whose own runs it was made of.
    """

    value: float
    std: float
    null: float
    pairs: int
    of: tuple[Loss, ...] = ()

    @property
    def known(self) -> bool:
        """Whether there is anything to show."""
        return not math.isnan(self.value)


_UNKNOWN = Average(math.nan, math.nan, math.nan, 0)


class Comparison:
    """The losses of an analysis and their pairs.

    Two losses are compared by the runs that have the same two seeds, and so the same initial adapter and the same
    batches; where there are none, by all their pairs that share an initial adapter, and else by all pairs.
    """

    def __init__(self, analysis: AnalysisFolder) -> None:
        self._analysis = analysis
        self._between: dict[frozenset[str], pd.DataFrame] = {}
        self._averages: dict[tuple[str, frozenset[str]], Average] = {}

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row a run, the base left out."""
        runs = self._analysis.table("runs", _RUN_TEXTS, _RUN_NUMBERS).drop_duplicates("run")
        runs = runs[runs["method"] != "base"].reset_index(drop=True)
        if not runs["arm"].any():  # of an analysis without the column, or of adapters made elsewhere
            runs["arm"] = runs["method"] + "-" + runs["lr"]
            twice = runs.duplicated(["arm", "rank", "seed", "init_seed"], keep=False)
            runs["arm"] = runs["arm"].where(~twice & (runs["lr"] != ""), runs["run"])
        runs["arm"] = runs["arm"].where(runs["arm"] != "", runs["run"])
        return runs

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
        return sorted(losses, key=lambda loss: (-rates[loss.arm], place_of(loss.method), loss.arm))

    @cached_property
    def looks(self) -> Looks:
        """The look of each loss, by its arm."""
        return Looks((loss.arm, loss.method) for loss in self.losses)

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
    def pairs(self) -> pd.DataFrame:
        """One row a pair of runs, with the loss and the seeds of both."""
        pairs = self._analysis.table("pairs", ("run_a", "run_b", "shared_initial"), (*MEASURES, *_NULLS, *_BESIDE))
        facts = self.runs.set_index("run")[["arm", "seed", "init_seed"]]
        for side in ("a", "b"):
            pairs = pairs.join(facts.add_suffix(f"_{side}"), on=f"run_{side}")
        same = (pairs["seed_a"] == pairs["seed_b"]) & (pairs["init_seed_a"] == pairs["init_seed_b"])
        return pairs.assign(same_seeds=same, shared=pairs["shared_initial"] == "True")

    def between(self, first: Loss, second: Loss) -> pd.DataFrame:
        """The pairs of runs by which two losses are compared; of a loss and itself those with one initial adapter."""
        if first is second:
            return self.repetitions(first)
        rows = self._of(first, second)
        for kind in ("same_seeds", "shared"):
            if rows[kind].any():
                return rows[rows[kind]]
        return rows

    def repetitions(self, loss: Loss, shared: bool = True) -> pd.DataFrame:
        """The pairs of one loss' own runs: other order of the data, and one initial adapter or two."""
        own = self._of(loss, loss)
        return own[own["shared"]] if shared else own[own["shared_initial"] == "False"]

    def _of(self, first: Loss, second: Loss) -> pd.DataFrame:
        """All pairs of a run of one loss and a run of the other."""
        if not self._between:
            arms = zip(self.pairs["arm_a"], self.pairs["arm_b"], strict=True)
            groups = (
                self.pairs.groupby([frozenset(pair) for pair in arms], sort=False).indices if len(self.pairs) else {}
            )
            self._between = {key: self.pairs.iloc[rows] for key, rows in groups.items()}
        return self._between.get(frozenset((first.arm, second.arm)), self.pairs.head(0))

    def average(self, measure: str, first: Loss, second: Loss) -> Average:
        """A measure between two losses, or of a loss with itself in another order of the data."""
        key = (measure, frozenset((first.arm, second.arm)))
        if key not in self._averages:
            self._averages[key] = average(self.between(first, second), measure)
        return self._averages[key]

    def floor(self, measure: str, first: Loss, second: Loss) -> Average:
        """What the two show against themselves at other seeds, where that is known of at least one.

        Where the two are compared from one initial adapter, theirs is one too: the data come in another order. Of
        cosines √(ρ·ρ'), which two losses would have that pull in one direction, each with noise of its own; of other
        measures the mean. Its standard deviation follows from theirs, to first order; NaN where one is not known.
        """
        kinds = set(self.between(first, second)["shared_initial"]) - {""}
        if len(kinds) != 1 and first is not second:
            return _UNKNOWN
        if kinds == {"False"}:
            own = {loss: average(self.repetitions(loss, shared=False), measure) for loss in (first, second)}
        else:
            own = {loss: self.average(measure, loss, loss) for loss in (first, second)}
        of = tuple(loss for loss, each in own.items() if each.known)
        known = [own[loss] for loss in of]
        if not known:
            return _UNKNOWN
        values = [each.value for each in known]
        slopes = [1 / len(known)] * len(known)
        if measure == "cosine":
            value = math.prod(max(each, 0.0) for each in values) ** (1 / len(values))
            slopes = [value / (len(values) * each) if each > 0 else 0.0 for each in values]
        else:
            value = sum(values) / len(values)
        std = math.hypot(*(slope * each.std for slope, each in zip(slopes, known, strict=True)))
        return Average(value, std, math.nan, sum(each.pairs for each in known), of)


def average(rows: pd.DataFrame, measure: str) -> Average:
    """A measure over some pairs; those that lack it do not count."""
    known = rows[rows[measure].notna()]
    null = f"{measure}_null"
    return Average(
        float(known[measure].mean()),
        float(known[measure].std(ddof=1)),
        float(known[null].mean()) if null in known else math.nan,
        len(known),
    )


def _name(run: pd.Series, several: bool) -> str:
    """`SFT`; `DPO 1e-3`, `DPO 1e-3 beta=0.3` where the method is there several times; of an adapter its own name."""
    if run["arm"] == run["run"]:
        return run["run"] if pd.isna(run["learning_rate"]) or several else name_of(run["method"])
    if not several:
        return name_of(run["method"])
    return names.of_loss(run["method"], run["learning_rate"], run["arm"].partition(" ")[2])
