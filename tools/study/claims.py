"""Sentences of the abstract: what each primary hypothesis' verdict lets one say, and what it would have said otherwise.

Both sentences were written before the results (docs/studies/how_much_is_the_loss_hypotheses.md). Which of them is the
claim is decided by the verdict alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.study.verdicts import NOT_MEASURED, NOT_SHOWN, REVERSED, SHOWN

BESIDE = "H1, beside"
_MODELS = {"embedded": "embedded model", "smollm2": "SmolLM2-135M"}


@dataclass(frozen=True)
class Claim:
    """What is said if a hypothesis is shown, and what otherwise."""

    shown: str
    otherwise: str


CLAIMS = {
    "H1a": Claim(
        "The data decide more of an update than the loss does",
        "A loss leaves a mark of its own, which other rollouts do not erase: its share is at least that of the data",
    ),
    "H2": Claim(
        "What two losses share is decided before step 1: gradients at the start tell how alike the updates will be",
        "Similarity is made during training: what gradients say before it accounts for less than 81% of the variance",
    ),
    "H3": Claim(
        "The geometry suite is the norm in disguise: sparsity, spectral shift, rotation and overlap follow the norm, "
        "and a rotated copy of an update shows the same",
        "The diagnostics tell losses apart beyond the size of their updates",
    ),
    "H4": Claim(
        "DPO moves behaviour further per unit of norm, at least eight times as far",
        "Equal norms are equal behaviour, within the factor that was found",
    ),
    "H5, draw": Claim(
        "Function depends less on the draw of the data than weights do",
        "Function is as much the sample's as weights are",
    ),
    "H5, start": Claim(
        "Function depends less on the initial adapter than weights do",
        "Function is as much the start's as weights are",
    ),
    "H6": Claim(
        "That DPO's update is the smallest is its learning rate: at one rate its norm is at least half of SFT's",
        "At one rate, too, DPO's update is less than half as long as SFT's",
    ),
}
# What is said beside H1a: it counts what a loss does only on these data as the data's, `BESIDE` counts it as nobody's.
_UNTOLD = "counting what a loss does on these data alone as nobody's, the two cannot be told apart"
_TOGETHER = "Loss and data decide together: the two ways of counting what only their combination explains disagree"


def claims(judged: Iterable[Mapping[str, Any]], number: Callable[[float], str]) -> list[str]:
    """Writes a line for each primary hypothesis and model.

    Args:
        judged: Verdicts (`verdicts.verdicts`), as rows.
        number: Formats a number.
    """
    rows = {(row["model"], row["part"]): row for row in judged}
    return [
        _line(row, claim, rows.get((model, BESIDE)) if part == "H1a" else None, number)
        for model in _MODELS
        for part, claim in CLAIMS.items()
        if (row := rows.get((model, part))) is not None
    ]


def _line(
    row: Mapping[str, Any], claim: Claim, beside: Mapping[str, Any] | None, number: Callable[[float], str]
) -> str:
    verdict = row["verdict"]
    said = {
        SHOWN: claim.shown,
        REVERSED: claim.otherwise,
        NOT_SHOWN: f"Neither “{claim.shown}” is shown nor its opposite",
        NOT_MEASURED: f"“{claim.shown}” was not measured",
    }[verdict]
    known = _known(row, number)
    if not math.isnan(row["unseen"]):
        known += f"; without the runs that suggested it {number(row['unseen'])}"
    if beside is not None:
        if row["value"] * beside["value"] < 0:
            said, verdict = _TOGETHER, f"{verdict}, and not alone"
        elif beside["verdict"] != verdict:
            said = f"{said}; {_UNTOLD}"
        known += f"; {_known(beside, number)}"
    rest = {SHOWN: claim.otherwise, REVERSED: claim.shown}.get(verdict)
    otherwise = f" *Had it gone the other way:* “{rest}.”" if rest else ""
    part = re.sub(r", (\w+)", r" (\1)", row["part"])
    return f"- **{part}, {_MODELS[row['model']]}: {verdict}.** {said} ({known}).{otherwise}"


def _known(row: Mapping[str, Any], number: Callable[[float], str]) -> str:
    """Writes a number with its interval and p."""
    known = f"{row['says']}: {number(row['value'])}"
    if not math.isnan(row["low"]):
        known += f", 95% {number(row['low'])} to {number(row['high'])}"
    return known if math.isnan(row["p"]) else f"{known}, p = {row['p']:.1g}"
