"""The findings of arXiv 2606.23740 under each way of matching the runs (H6): which hold, fail, or cannot be told.

What holding means was written down before the runs: docs/studies/how_much_is_the_loss_hypotheses.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.evaluation.statistics import holm, sign_flip
from tools.study.crossed import Crossed
from tools.study.hypotheses import jackknife, relative
from tools.study.results import Results

Array = NDArray[np.float64]

CLUSTER, OTHERS = ("sft", "rft", "rift"), ("dft", "grpo", "dpo")
LOSSES = (*CLUSTER, *OTHERS)
NOT_DPO = tuple(loss for loss in LOSSES if loss != "dpo")
# Largest relative cosine, of either sign, of what is called orthogonal.
ORTHOGONAL = 0.3
LEVEL = 0.05
# Norms that differ by less, in logarithms, were made equal.
_ROUNDING = 1e-3

FINDINGS = {
    "F1": "SFT, RFT and RIFT are one cluster", "F2": "GRPO is farther from SFT than RFT is, DFT farther still",
    "F3": "DPO is orthogonal to all", "F4": "DPO's update is the smallest",
    "F5": "DPO is the most accurate, and keeps what the base has",
}  # fmt: skip
# F3 of DPO and SFT alone.
TO_SFT = "F3 to SFT"
HOLDS, FAILS, CANNOT_TELL, BY_DESIGN = "holds", "fails", "cannot tell", "equal by design"


@dataclass(frozen=True)
class Finding:
    """A finding under one matching.

    Attributes:
        verdict: `holds`, `fails`, `cannot tell`, or `equal by design`.
        value: What it rests on: by how much the cosines are on the right side (F1 to F3), DPO's norm over SFT's (F4),
            its accuracy less that of the best other loss (F5).
        low: Lower end of the 95% interval over orders; NaN for F5, whose test is over problems.
        high: Upper end.
        from_base: Whether DPO's accuracy is shown to differ from the base's (F5).
    """

    verdict: str
    value: float
    low: float
    high: float
    from_base: bool = False


def matched(results: Results, chosen: NDArray[np.bool_] | pd.Series) -> Results:
    """Keeps some runs, and the gradients of their starts and draws."""
    index = np.flatnonzero(chosen)
    similarities = {kind: matrix[np.ix_(index, index)] for kind, matrix in results.similarities.items()}
    runs = results.runs.iloc[index].reset_index(drop=True)
    gradients = results.gradients
    if len(gradients):
        cells = set(zip(runs["start"], runs["draw"], strict=True))
        kept = [(row.start, row.draw_a) in cells and (row.start, row.draw_b) in cells for row in gradients.itertuples()]
        gradients = gradients[kept].reset_index(drop=True)
    return Results(runs, similarities, gradients)


def at_best_rate(results: Results, chosen_on: str, order: str) -> Results:
    """Keeps the runs of each loss at the rate that answers most validation problems at one order, without that order.

    Ties go to the smaller rate.

    Args:
        results: Runs at several rates.
        chosen_on: Column of the accuracy to choose by.
        order: The order whose runs choose, and are not reported.
    """
    runs = results.runs
    choosing = runs[runs["order"] == order].sort_values("learning_rate")
    best = choosing.loc[choosing.groupby("loss")[chosen_on].idxmax()].set_index("loss")["learning_rate"]
    return matched(results, (runs["learning_rate"] == runs["loss"].map(best)) & (runs["order"] != order))


def findings(results: Results, correct: str = "correct", norm: str = "norm") -> dict[str, Finding]:
    """Judges the five findings, and F3 as it was first written (`TO_SFT`), from the runs of six losses.

    Args:
        results: Runs that each have another order, from one draw and one start.
        correct: Column of the answers.
        norm: Column of ‖ΔW‖.
    """
    design = Crossed.of(results.runs, results.similarities["weights"])
    orders = design.levels["order"]
    whole = _relatives(design)
    parts = [_relatives(design.only("order", [o for o in orders if o != left_out])) for left_out in orders]

    def judged(statistic: Callable[[Mapping[tuple[str, str], float]], float]) -> Finding:
        value = statistic(whole)
        low, high = jackknife(value, [statistic(part) for part in parts])
        return Finding(_side(low, high), value, low, high)

    return {
        "F1": _all([judged(_closer_within(loss)) for loss in CLUSTER]),
        "F2": judged(_in_order),
        "F3": _all([judged(_within(loss)) for loss in NOT_DPO]),
        "F4": _smallest(results.runs, norm),
        "F5": _most_accurate(results.runs, correct),
        TO_SFT: judged(_within("sft")),
    }


def _relatives(design: Crossed) -> dict[tuple[str, str], float]:
    same = design.between(same_draw=True)
    places = {loss: place for place, loss in enumerate(design.losses)}
    return {(a, b): relative(same, places[a], places[b]) for a in LOSSES for b in LOSSES if a != b}


def _closer_within(loss: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    """Returns by how much a loss of the cluster is closer to the other two than to any other loss."""
    return lambda cosines: float(
        np.min([cosines[loss, other] for other in CLUSTER if other != loss])
        - np.max([cosines[loss, other] for other in OTHERS])
    )


def _in_order(cosines: Mapping[tuple[str, str], float]) -> float:
    steps = [cosines["sft", "rft"] - cosines["sft", "grpo"], cosines["sft", "grpo"] - cosines["sft", "dft"]]
    return float(np.min(steps))


def _within(loss: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda cosines: ORTHOGONAL - abs(cosines["dpo", loss])


def _all(parts: Sequence[Finding]) -> Finding:
    """Joins findings: all must hold, and one that fails is enough; the numbers are those of the least one."""
    verdicts = {part.verdict for part in parts}
    verdict = FAILS if FAILS in verdicts else CANNOT_TELL if CANNOT_TELL in verdicts else HOLDS
    return replace(parts[int(np.argmin([part.value for part in parts]))], verdict=verdict)


def _side(low: float, high: float) -> str:
    return HOLDS if low > 0 else FAILS if high < 0 else CANNOT_TELL


def _smallest(runs: pd.DataFrame, norm: str) -> Finding:
    """Judges whether DPO's norm is below the smallest other; the value is its ratio to SFT's.

    Norms that were made equal differ by rounding alone.
    """
    if np.ptp(np.log(runs[norm])) < _ROUNDING:
        return Finding(BY_DESIGN, 1.0, 1.0, 1.0)

    def logs(of: pd.DataFrame) -> tuple[float, float]:
        mean = np.log(of[norm]).groupby(of["loss"]).mean()
        return float(mean.drop("dpo").min() - mean["dpo"]), float(mean["dpo"] - mean["sft"])

    orders = list(dict.fromkeys(runs["order"]))
    parts = [logs(runs[runs["order"] != order]) for order in orders]
    (margin, ratio) = logs(runs)
    verdict = _side(*jackknife(margin, [part[0] for part in parts]))
    low, high = jackknife(ratio, [part[1] for part in parts])
    return Finding(verdict, float(np.exp(ratio)), float(np.exp(low)), float(np.exp(high)))


def _most_accurate(runs: pd.DataFrame, correct: str) -> Finding:
    """Judges DPO against each other loss and the base by sign-flip tests over problems with Holm's correction."""
    shares = {loss: np.mean(np.stack(list(own[correct])), axis=0) for loss, own in runs.groupby("loss")}
    base = np.asarray(runs["base_correct"].iloc[0], dtype=float)
    others = {**{loss: share for loss, share in shares.items() if loss != "dpo"}, "base": base}
    p = holm([sign_flip(shares["dpo"], other) for other in others.values()])
    differences = np.array([float((shares["dpo"] - other).mean()) for other in others.values()])
    better, worse = (p <= LEVEL) & (differences > 0), (p <= LEVEL) & (differences < 0)
    is_loss = np.array([name != "base" for name in others])
    verdict = FAILS if worse.any() else HOLDS if better[is_loss].all() else CANNOT_TELL
    from_base = bool((better | worse)[~is_loss].any())
    return Finding(verdict, float(differences[is_loss].min()), float("nan"), float("nan"), from_base)
