"""Sentences of the abstract: what each primary hypothesis' verdict lets one say, and what it would have said otherwise.

What is said otherwise is that of docs/studies/how_much_is_the_loss_hypotheses.md, where changes of it are dated. The
verdict alone decides what is claimed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tools.study.verdicts import NOT_MEASURED, NOT_SHOWN, REVERSED, SHOWN

BESIDE, AS_THE_LOSS, EQUAL_NORM = "H1, beside", "H1, as the loss's", "H4, equal norm"
# Parts that are told with a primary one, and in which words.
ALSO = {
    "H1a": {BESIDE: "given to nobody", AS_THE_LOSS: "given to the loss"},
    "H2": {"H2, two draws": "two losses on two draws"},
    "H4": {"H4b": "at one rate, where the rule is twice,", EQUAL_NORM: "at equal norm, the others stopped early"},
    "H5, start": {"H5, start, by inputs": "less weights as inputs meet them"},
}
_MODELS = {"embedded": "embedded model", "smollm2": "SmolLM2-135M"}


@dataclass(frozen=True)
class Claim:
    """What is said if a hypothesis is shown, and what otherwise."""

    shown: str
    otherwise: str


CLAIMS = {
    "H1a": Claim(
        "The draw of the data (which problems, which rollouts) decides more of an update than the loss does",
        "A loss leaves a mark of its own, which other rollouts do not erase: its share is at least that of the data",
    ),
    "H2": Claim(
        "What two losses share on the same rollouts can be foreseen: gradients before step 1 tell which updates "
        "will be more alike",
        "Similarity is made during training: what gradients say before it accounts for less than 81% of the variance",
    ),
    "H3": Claim(
        "The geometry suite is the norm in disguise: sparsity, spectral shift, rotation and overlap follow the norm, "
        "and a rotated copy of an update shows the same",
        "The diagnostics tell losses apart beyond the size of their updates",
    ),
    "H4": Claim(
        "DPO's KL to the base per squared norm is at least eight times that of the pointwise losses",
        "Equal norms are equal behaviour within a factor of eight",
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
        "At equal steps, that DPO's update is the smallest is its learning rate: at one rate its norm is at least half "
        "of SFT's",
        "At one rate, too, DPO's update is less than half as long as SFT's",
    ),
}
# What is said beside H1a: it counts what a loss does only on one draw as the draw's, `BESIDE` counts it as nobody's.
_ITS_OWN = "Counting as the draw's what a loss does on one draw alone"
_UNTOLD = "counting it as nobody's, the two cannot be told apart"
_LOSS_HAS_MORE = "counting it as the loss's, the loss has more"
_TOGETHER = "Loss and data decide together: the two ways of counting what only their combination explains disagree"


def claims(judged: Iterable[Mapping[str, Any]], number: Callable[[float], str]) -> list[str]:
    """Writes a line for each primary hypothesis: what one may say of the first model, and what another one shows.

    Args:
        judged: Verdicts (`verdicts.verdicts`), as rows.
        number: Formats a number.
    """
    rows = {(row["model"], row["part"]): row for row in judged}
    lines = []
    for part, claim in CLAIMS.items():
        of_part = [rows[model, part] for model in _MODELS if (model, part) in rows]
        if not of_part:
            continue
        first, *others = of_part
        also = {other: one for other in ALSO.get(part, ()) if (one := rows.get((first["model"], other))) is not None}
        again = [f" On {_MODELS[row['model']]}: *{row['verdict']}* ({_value(row, number)})." for row in others]
        lines.append(_line(first, claim, also, number) + "".join(again))
    return lines


def _line(
    row: Mapping[str, Any], claim: Claim, also: Mapping[str, Mapping[str, Any]], number: Callable[[float], str]
) -> str:
    verdict = row["verdict"]
    said = {
        SHOWN: claim.shown,
        REVERSED: claim.otherwise,
        NOT_SHOWN: f"Neither “{claim.shown}” is shown nor “{claim.otherwise}”",
        NOT_MEASURED: f"“{claim.shown}” was not measured",
    }[verdict]
    known = f"{row['says']}: {_known(row, number)}"
    if (beside := also.get(BESIDE)) is not None:
        if row["value"] * beside["value"] < 0:
            said, verdict = _TOGETHER, f"{verdict}, and not alone"
        elif verdict == SHOWN:
            also_said = [_UNTOLD] * (beside["verdict"] == NOT_SHOWN)
            also_said += [_LOSS_HAS_MORE] * (also[AS_THE_LOSS]["verdict"] == REVERSED)
            said = "; ".join([f"{_ITS_OWN}, {said[0].lower()}{said[1:]}", *also_said])
    if verdict == SHOWN and also.get(EQUAL_NORM, row)["verdict"] != SHOWN:
        said = f"{said}, at the losses' own rates and norms, but not at equal norm"
    for other, one in also.items():
        known += f"; {ALSO[row['part']][other]} {_known(one, number)}"
        known += f", *{one['verdict']}*" * (one["verdict"] != row["verdict"])
    rest = {SHOWN: claim.otherwise, REVERSED: claim.shown}.get(verdict)
    otherwise = f" *Had it gone the other way:* “{rest}.”" if rest else ""
    # H5 as it was written is shown only if both halves are.
    name = re.sub(r"^(H5), (\w+)", r"half of \1 (\2)", row["part"])
    return f"- **{name}, {_MODELS[row['model']]}: {verdict}.** {said} ({known}).{otherwise}"


def _known(row: Mapping[str, Any], number: Callable[[float], str]) -> str:
    """Writes a number with its interval and p."""
    known = _value(row, number)
    if math.isnan(row["p"]):
        return known
    # Smaller ones are not told apart.
    return f"{known}, p ≤ .001" if row["p"] <= 0.001 else f"{known}, p = {row['p']:.2g}".replace("= 0.", "= .")


def _value(row: Mapping[str, Any], number: Callable[[float], str]) -> str:
    """Writes a number with its interval."""
    known = number(row["value"])
    return known if math.isnan(row["low"]) else f"{known}, 95% {number(row['low'])} to {number(row['high'])}"
