"""Measures of runs and of pairs of runs: each is declared once, and all that shows it reads its declaration.

From what a measure says of itself come the columns of the tables, the terminal, the report and its explorer, the tables
for papers, the panels of W&B and the reference in docs/reference/measures.md. A measure is a function of a view
(`views`) and an entry in the tuple `MEASURES` of a module of `definitions`.
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
from losslens.measures.views import Array, Functions, PairWeights, RunWeights

# Where it is shown: in everything; in the terminal and the tables of arms as well; in CSV, explorer and docs only.
Tier = Literal["main", "more", "rest"]
# How repeats of two losses combine (analysis/repeats.py): the ceiling √(ρρ') and a ratio; the repeat level ½(d + d')
# and an excess; a level only; a function of the cosine, whose level is that of the cosine's.
Kind = Literal["similarity", "distance", "level", "derived"]
_TIERS = ("main", "more", "rest")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is told of a measure, whatever it is of.

    Attributes:
        name: Of its columns.
        label: What a reader calls it.
        place: Where it stands among others, least first.
        tier: Where it is shown.
        short: What stands over a narrow column; `label` if empty.
        unit: Of its values; `%` are shares, shown times 100.
        digits: After the point, where it stands beside others.
        bounds: What the colours of its values go from and to; None: from 0 to the most there is. What may be negative
            has a null on both sides of 0.
        term: The entry of the glossary that it belongs to; `label` if empty.
        summary: That entry: a sentence for who meets it for the first time.
        definition: In the reference, as Markdown.
        source: Where the definition is from.
    """

    name: str
    label: str
    place: float
    tier: Tier = "rest"
    short: str = ""
    unit: Literal["", "°", "%", "nats a token"] = ""
    digits: int = 3
    bounds: tuple[float, float] | None = None
    term: str = ""
    summary: str = ""
    definition: str
    source: str = ""

    @property
    def has_null(self) -> bool:
        """Whether it is known what a random update, or two unrelated ones, show."""
        return getattr(self, "null", None) is not None

    @property
    def heading(self) -> str:
        """What stands over its column."""
        return self.short or self.label

    @property
    def title(self) -> str:
        """What stands above a plot, its unit with it."""
        return self.titled("")

    def titled(self, to: str) -> str:
        """The same of two, `to` saying what it is to."""
        return f"{self.label[0].upper()}{self.label[1:]}{to}{f' ({self.unit})' * (self.unit not in ('', '%'))}"

    @property
    def in_unit(self) -> str:
        """` (nats a token)`: the unit, where it does not stand beside each number."""
        return f" ({self.unit})" * (self.unit not in ("", "%", "°"))

    def show(self, value: float) -> str:
        """`0.951`, `17.7°`, `57.6%`; what is not defined is a dash."""
        if value is None or math.isnan(value):
            return "–"
        percent = self.unit == "%"
        text = f"{100 * value if percent else value:.{self.digits}f}"
        text = text.replace("-", "−" if text.strip("-0.") else "")
        return text + self.unit * (self.unit in ("°", "%"))


@dataclass(frozen=True, kw_only=True)
class RunMeasure(Measure):
    """A number of one update, of all its modules and of each.

    Attributes:
        value: Of each run, from their weights; NaN where it is not defined.
        null: What a random update of the same size and shape shows, on average; None where that says nothing.
        needs_base: Whether it is about W0 as well: then it is not logged while a run trains.
    """

    value: Callable[[RunWeights], Array]
    null: Callable[[RunWeights], Array] | None = None
    needs_base: bool = False


@dataclass(frozen=True, kw_only=True)
class PairMeasure(Measure):
    """A number of two updates, the same both ways; what is of weights is of all modules, of each layer and each module.

    Attributes:
        kind: How repeats combine.
        identical: Its value for two updates that are the same.
        derived: Of kind `derived`, the function of the cosine that it is.
    """

    unit: Literal["", "°", "nats a token"] = ""
    kind: Kind
    derived: Callable[[Array], Array] | None = None
    identical: float

    @property
    def level(self) -> Literal["ceiling", "repeat"]:
        """What the level is called that two copies of one loss show."""
        return "ceiling" if self.kind == "similarity" else "repeat"

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the names of its columns where two arms are compared, its own value first."""
        relative = ("_relative", "_low", "_high") * (self.kind in ("similarity", "distance"))
        verdict = ("_verdict",) * (self.name == "cosine")
        return ("", "_min", "_max", *("_null",) * self.has_null, f"_{self.level}", *relative, *verdict)


@dataclass(frozen=True, kw_only=True)
class WeightMeasure(PairMeasure):
    """One that needs nothing but the updates.

    Attributes:
        value: Of each pair, from their weights; NaN where it is not defined.
        null: What two updates show that have nothing in common but their shapes, ranks and singular values (and, where
            they share one, A): of what may be negative the bound of 95% of absolute values, of what is derived from it
            its value there, of others the mean.
    """

    value: Callable[[PairWeights], Array]
    null: Callable[[PairWeights], Array] | None = None


@dataclass(frozen=True, kw_only=True)
class FunctionMeasure(PairMeasure):
    """One that needs forward passes; measured of the chosen pairs.

    Attributes:
        value: Of each pair, from its passes; NaN where none were made.
        interval: Its 95% interval, low and high; None where it has none.
    """

    value: Callable[[Functions], Array]
    interval: Callable[[Functions], tuple[Array, Array]] | None = None


@cache
def _all() -> tuple[Measure, ...]:
    modules = [import_module(f"{definitions.__name__}.{module.name}") for module in iter_modules(definitions.__path__)]
    found = [measure for module in modules for measure in getattr(module, "MEASURES", ())]
    assert len({measure.name for measure in found}) == len(found)
    return tuple(sorted(found, key=lambda measure: measure.place))


def run_measures(tier: Tier = "rest") -> tuple[RunMeasure, ...]:
    """The measures of one run, down to `tier`."""
    return tuple(m for m in _all() if isinstance(m, RunMeasure) and _shown(m, tier))


def pair_measures(tier: Tier = "rest") -> tuple[PairMeasure, ...]:
    """The measures of two runs, down to `tier`."""
    return tuple(m for m in _all() if isinstance(m, PairMeasure) and _shown(m, tier))


def measures_besides_cosine(tier: Tier = "rest") -> tuple[PairMeasure, ...]:
    """Those of `pair_measures` but the cosine, which has a verdict."""
    return tuple(m for m in pair_measures(tier) if m.name != "cosine")


def weight_measures(tier: Tier = "rest") -> tuple[WeightMeasure, ...]:
    """Those of `pair_measures` that need nothing but the updates."""
    return tuple(m for m in pair_measures(tier) if isinstance(m, WeightMeasure))


def function_measures(tier: Tier = "rest") -> tuple[FunctionMeasure, ...]:
    """Those of `pair_measures` that need forward passes."""
    return tuple(m for m in pair_measures(tier) if isinstance(m, FunctionMeasure))


def get_measure(name: str) -> Measure:
    """The measure of that name."""
    return next(measure for measure in _all() if measure.name == name)


def glossary_terms() -> dict[str, str]:
    """The glossary: the sentence of each term, in the order of the measures."""
    return {m.term or m.label: m.summary for m in _all() if m.summary}


def _shown(measure: Measure, tier: Tier) -> bool:
    return _TIERS.index(measure.tier) <= _TIERS.index(tier)
