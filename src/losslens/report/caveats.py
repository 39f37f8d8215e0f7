"""Caveats: what limits the findings, such as losses without seeds, repeats or a base."""

from __future__ import annotations

import math
from collections.abc import Iterable

from losslens.core.commands import typed_command
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import listed


def caveats(analysis: AnalysisFolder, comparison: LossComparison) -> list[str]:
    """Returns the caveats, one sentence or two each."""
    return [
        *_own_rows(analysis, comparison), *_seeds(comparison), *_repeats(comparison), *_no_base(analysis),
        *_lost(comparison),
    ]  # fmt: skip


def _own_rows(analysis: AnalysisFolder, comparison: LossComparison) -> Iterable[str]:
    own = own_rows(analysis, comparison)
    if own:
        one = len(own) == 1
        yield (
            f"{listed(own)} trained on rows of {'its' if one else 'their'} own: samples of {'its' if one else 'their'} "
            "policy for the same prompts. Other runs of the same seed do not share "
            f"{'its' if one else 'their'} batches, so a difference may lie in the rows as well as in the loss."
        )


def own_rows(analysis: AnalysisFolder, comparison: LossComparison) -> list[str]:
    """Returns the displayed names of the methods that trained on samples of their own policy."""
    arms = analysis.table("arms", ("arm", "samples"), ())
    sampled = set(arms.loc[arms["samples"] == "own", "arm"])
    return [loss.name for loss in comparison.losses if loss.arm in sampled]


def _seeds(comparison: LossComparison) -> Iterable[str]:
    counts = {loss: len(loss.runs) for loss in comparison.losses if loss.runs and not math.isnan(loss.learning_rate)}
    if not counts:
        return
    once = [loss.name for loss, count in counts.items() if count == 1]
    if not once:
        fewest = min(counts.values())
        yield (
            f"Every loss was trained at least {fewest} times. Tests are over problems, not over seeds; ± is the "
            "standard deviation over runs."
        )
        return
    who = "Each loss was" if 1 < len(once) == len(counts) else f"{listed(once)} {'was' if len(once) == 1 else 'were'}"
    yield (
        f"{who} trained once, so how much of this would change with another seed is unknown. Intervals and tests are "
        "over problems, not over seeds."
    )


def _repeats(comparison: LossComparison) -> Iterable[str]:
    reference = comparison.reference
    if reference is None or not comparison.others:
        return
    own = {loss: comparison.of("cosine", loss, loss) for loss in comparison.losses if loss.runs}
    again = {loss: cosine for loss, cosine in own.items() if cosine.known and cosine.changed != "start"}
    unknown = [loss for loss in own if loss not in again]
    if unknown:
        methods = dict.fromkeys(loss.method for loss in unknown if not math.isnan(loss.learning_rate))
        how = (
            f" (`{typed_command('train.py')}{' -m' * (len(methods) > 1)} method={','.join(methods)} seed=…`)"
            if methods
            else ""
        )
        one = len(unknown) == 1
        yield (
            f"There is no ceiling for {listed([loss.name for loss in unknown])}: {'it was' if one else 'they were'} "
            f"not trained with a second data order{how}, so {'its repeat is' if one else 'their repeats are'} not "
            "known."
        )
    two = [loss.name for loss, cosine in again.items() if cosine.repeats == 2]
    if two:
        were = "was" if len(two) == 1 else "were"
        yield f"{listed(two)} {were} trained with only two seeds; three would give an interval and a verdict."


def _no_base(analysis: AnalysisFolder) -> Iterable[str]:
    runs = analysis.table("runs", ("method",), ("accuracy",))
    scored = runs[runs["accuracy"].notna()]
    if len(scored) and not (scored["method"] == "base").any():
        yield "The untrained base was not scored, so whether training helped or hurt is not known."


def _lost(comparison: LossComparison) -> Iterable[str]:
    for loss in comparison.losses:
        if loss.diverged:
            total = int(comparison.runs["arm"].eq(loss.arm).sum())
            yield f"{loss.name}: {loss.diverged} of {total} run{'s' * (total != 1)} diverged or collapsed."
