"""What must be known before any of the findings is believed."""

from __future__ import annotations

import math
from collections.abc import Iterable

from losslens.report.comparison import Comparison
from losslens.report.folder import AnalysisFolder
from losslens.report.numbers import listed


def caveats(analysis: AnalysisFolder, comparison: Comparison) -> list[str]:
    """What must be known before any of it is believed."""
    return [*_seeds(comparison), *_repeats(comparison), *_no_base(analysis), *_lost(comparison)]


def _seeds(comparison: Comparison) -> Iterable[str]:
    counts = {loss: len(loss.runs) for loss in comparison.losses if loss.runs and not math.isnan(loss.learning_rate)}
    if not counts:
        return
    once = [loss.name for loss, count in counts.items() if count == 1]
    if not once:
        fewest = min(counts.values())
        yield f"Every loss was trained at least {fewest} times. Tests are about problems, ± is over runs."
        return
    who = "Each loss was" if 1 < len(once) == len(counts) else f"{listed(once)} {'was' if len(once) == 1 else 'were'}"
    yield (
        f"{who} trained once: how much of this would be otherwise at another seed is not known. Intervals and tests "
        "are about problems, not about seeds."
    )


def _repeats(comparison: Comparison) -> Iterable[str]:
    reference = comparison.reference
    if reference is None or not comparison.others:
        return
    own = comparison.of("cosine", reference, reference)
    if not own.known:
        how = "" if math.isnan(reference.learning_rate) else f" (`python train.py method={reference.method} seed=…`)"
        yield (
            f"There is no ceiling: {reference.name} was not trained in another order of the data{how}, so nothing says "
            "how near a loss is to itself."
        )
    elif own.repeats == 2:
        yield f"{reference.name} was trained at two seeds: three give an interval, and a verdict."


def _no_base(analysis: AnalysisFolder) -> Iterable[str]:
    runs = analysis.table("runs", ("method",), ("accuracy",))
    scored = runs[runs["accuracy"].notna()]
    if len(scored) and not (scored["method"] == "base").any():
        yield "The untrained base was not scored: whether training helped or hurt is not known."


def _lost(comparison: Comparison) -> Iterable[str]:
    for loss in comparison.losses:
        if loss.diverged:
            total = int(comparison.runs["arm"].eq(loss.arm).sum())
            yield f"{loss.name}: {loss.diverged} of {total} run{'s' * (total != 1)} diverged or collapsed."
