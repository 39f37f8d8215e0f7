"""Registry of the measures of runs and of pairs of runs.

Each measure is declared once: a function of a view (`views`) and an entry in the tuple `MEASURES` of a module of
`definitions`. The columns of the tables, the terminal, the report and its explorer, the tables for papers, the W&B
panels and the reference in docs/reference/measures.md are derived from the declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

from losslens.measures import definitions
from losslens.measures.views import Array, Functions, PairWeights, RunFunctions, RunWeights

# Where a measure is shown: main: everywhere; more: in the terminal and the tables of arms; rest: only in CSV files,
# explorer and docs.
Tier = Literal["main", "more", "rest"]
# How the repeats of two losses combine (analysis/repeats.py): similarity: ceiling √(ρρ') and ratio; distance: repeat
# level ½(d + d') and excess; level: repeat level only; derived: a function of the cosine, its level from the ceiling.
Kind = Literal["similarity", "distance", "level", "derived"]
_TIERS = ("main", "more", "rest")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Declaration of a measure of runs or of pairs.

    Attributes:
        name: Name of its columns.
        label: Displayed name.
        place: Position among the measures, smallest first.
        tier: Where it is shown.
        short: Heading of a narrow column; `label` if empty.
        unit: Unit of its values; `%` marks shares, shown times 100.
        digits: Decimals shown in tables.
        bounds: Ends of its colour scale; None for 0 to the largest value. If the lower end is negative, the null is
            two-sided (±).
        term: Its entry in the glossary; `label` if empty.
        summary: The text of that entry, one plain sentence.
        definition: The definition in the reference, as Markdown.
        source: Source of the definition.
    """

    name: str
    label: str
    place: float
    tier: Tier = "rest"
    short: str = ""
    unit: Literal["", "°", "%", "nats per token"] = ""
    digits: int = 3
    bounds: tuple[float, float] | None = None
    term: str = ""
    summary: str = ""
    definition: str
    source: str = ""

    @property
    def has_null(self) -> bool:
        """True if the measure has a null."""
        return getattr(self, "null", None) is not None

    @property
    def heading(self) -> str:
        """Heading of its column."""
        return self.short or self.label

    @property
    def title(self) -> str:
        """Title of a plot, with its unit."""
        return self.titled("")

    def titled(self, to: str) -> str:
        """Returns the title with `to` after the label, such as ` to SFT`."""
        return f"{self.label[0].upper()}{self.label[1:]}{to}{f' ({self.unit})' * (self.unit not in ('', '%'))}"

    @property
    def in_unit(self) -> str:
        """The unit as ` (nats per token)`; empty for units shown with each number."""
        return f" ({self.unit})" * (self.unit not in ("", "%", "°"))

    def show(self, value: float) -> str:
        """Formats a value: `0.951`, `17.7°`, `57.6%`; a dash if undefined."""
        if value is None or math.isnan(value):
            return "–"
        percent = self.unit == "%"
        text = f"{100 * value if percent else value:.{self.digits}f}"
        text = text.replace("-", "−" if text.strip("-0.") else "")
        return text + self.unit * (self.unit in ("°", "%"))


@dataclass(frozen=True, kw_only=True)
class RunFunctionMeasure(Measure):
    """A measure of one run that needs forward passes.

    Attributes:
        value: Computes the value of each run; NaN for runs without forward passes.
        null: Computes the value of copies of the update whose left singular vectors are random; None if the measure has
            no null.
    """

    value: Callable[[RunFunctions], Array]
    null: Callable[[RunFunctions], Array] | None = None


@dataclass(frozen=True, kw_only=True)
class RunMeasure(Measure):
    """A measure of one update, over all its modules and of each.

    Attributes:
        value: Computes the value of each run; NaN where undefined.
        null: Computes what a random update of the same size and shape would show, its mean or a 95% bound as
            `definition` says; None if the measure has no null.
        needs_base: True if it depends on W0.
        needs_path: True if it depends on snapshots.
        needs_gradient: True if it depends on the gradient before step 1.
    """

    value: Callable[[RunWeights], Array]
    null: Callable[[RunWeights], Array] | None = None
    needs_base: bool = False
    needs_path: bool = False
    needs_gradient: bool = False

    @property
    def logged(self) -> bool:
        """True if it is logged during training, where nothing but the update is known."""
        return not (self.needs_base or self.needs_path or self.needs_gradient)


@dataclass(frozen=True, kw_only=True)
class PairMeasure(Measure):
    """A symmetric measure of two updates; weight measures are computed over all modules, by layer and by module.

    Attributes:
        kind: How repeats combine.
        identical: Its value for two identical updates.
        derived: For kind `derived`, the function that computes it from the cosine.
    """

    unit: Literal["", "°", "nats per token"] = ""
    kind: Kind
    derived: Callable[[Array], Array] | None = None
    identical: float

    @property
    def level(self) -> Literal["ceiling", "repeat"]:
        """Name of the level for two updates of the same loss."""
        return "ceiling" if self.kind == "similarity" else "repeat"

    @property
    def endings(self) -> tuple[str, ...]:
        """Suffixes of its columns in tables that compare two arms, the value itself first."""
        relative = ("_relative", "_low", "_high") * (self.kind in ("similarity", "distance"))
        verdict = ("_verdict",) * (self.name == "cosine")
        return ("", "_min", "_max", *("_null",) * self.has_null, f"_{self.level}", *relative, *verdict)


@dataclass(frozen=True, kw_only=True)
class WeightMeasure(PairMeasure):
    """A pair measure computed from the updates alone.

    Attributes:
        value: Computes the value of each pair; NaN where undefined.
        null: Computes the value for two updates that share only their shapes, ranks and singular values (and the
            initial A, if the runs share it): for signed measures the 95% bound of the absolute value, for those derived
            from one their value at that bound, for others the mean.
    """

    value: Callable[[PairWeights], Array]
    null: Callable[[PairWeights], Array] | None = None


@dataclass(frozen=True, kw_only=True)
class FunctionMeasure(PairMeasure):
    """A pair measure that needs forward passes, computed for the chosen pairs only.

    Attributes:
        value: Computes the value of each pair; NaN for pairs without forward passes.
        null: Computes the value for copies of the two updates whose left singular vectors are random and whose KL is
            theirs: for signed measures the 95% bound of the absolute value, for others the mean. None if the measure
            has no null.
        interval: Computes the ends of its 95% interval; None if it has no interval.
    """

    value: Callable[[Functions], Array]
    null: Callable[[Functions], Array] | None = None
    interval: Callable[[Functions], tuple[Array, Array]] | None = None


@cache
def _all() -> tuple[Measure, ...]:
    modules = [import_module(f"{definitions.__name__}.{module.name}") for module in iter_modules(definitions.__path__)]
    measures = [measure for module in modules for measure in getattr(module, "MEASURES", ())]
    assert len({measure.name for measure in measures}) == len(measures)
    return tuple(sorted(measures, key=lambda measure: measure.place))


def run_measures(tier: Tier = "rest") -> tuple[RunMeasure | RunFunctionMeasure, ...]:
    """Returns the measures of one run, down to `tier`."""
    return tuple(m for m in _all() if isinstance(m, RunMeasure | RunFunctionMeasure) and _shown(m, tier))


def run_weight_measures(tier: Tier = "rest") -> tuple[RunMeasure, ...]:
    """Returns the `run_measures` that need no forward passes."""
    return tuple(m for m in run_measures(tier) if isinstance(m, RunMeasure))


def run_function_measures(tier: Tier = "rest") -> tuple[RunFunctionMeasure, ...]:
    """Returns the `run_measures` that need forward passes."""
    return tuple(m for m in run_measures(tier) if isinstance(m, RunFunctionMeasure))


def pair_measures(tier: Tier = "rest") -> tuple[PairMeasure, ...]:
    """Returns the measures of two runs, down to `tier`."""
    return tuple(m for m in _all() if isinstance(m, PairMeasure) and _shown(m, tier))


def measures_besides_cosine(tier: Tier = "rest") -> tuple[PairMeasure, ...]:
    """Returns `pair_measures` without the cosine, which has a verdict."""
    return tuple(m for m in pair_measures(tier) if m.name != "cosine")


def weight_measures(tier: Tier = "rest") -> tuple[WeightMeasure, ...]:
    """Returns the `pair_measures` that need only the updates."""
    return tuple(m for m in pair_measures(tier) if isinstance(m, WeightMeasure))


def function_measures(tier: Tier = "rest") -> tuple[FunctionMeasure, ...]:
    """Returns the `pair_measures` that need forward passes."""
    return tuple(m for m in pair_measures(tier) if isinstance(m, FunctionMeasure))


def get_measure(name: str) -> Measure:
    """Returns the measure with this name."""
    return next(measure for measure in _all() if measure.name == name)


def glossary_terms() -> dict[str, str]:
    """Returns the summary of each glossary term, in the order of the measures."""
    return {m.term or m.label: m.summary for m in _all() if m.summary}


def _shown(measure: Measure, tier: Tier) -> bool:
    return _TIERS.index(measure.tier) <= _TIERS.index(tier)
