"""Verdicts on the hypotheses of the study, by the rules of docs/studies/how_much_is_the_loss_hypotheses.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from tools.study.crossed import Estimate
from tools.study.findings import HOLDS, TO_SFT, Finding
from tools.study.hypotheses import SUITE

# What the measures of the suite are called in a sentence.
_MEASURES = {
    "unchanged": "sparsity", "spectral_shift": "the shift", "rotation": "rotation", "small_overlap": "the overlap",
}  # fmt: skip

SHOWN, NOT_SHOWN, REVERSED, NOT_MEASURED = "shown", "not shown", "the other way", "not measured"
# Least difference of H1a, since its interval takes the draws as given.
LEAST_DIFFERENCE = 0.1
# Losses of pairs that are said to be on DPO's side (H4c).
PAIR_LOSSES = ("ipo", "simpo", "cal_dpo")
# The name of the rate that is one for all losses: 1e-3 on the embedded model.
ONE_RATE = "x1.0"


# Takes a number from those of a model.
Number = Callable[[Mapping[str, Any]], Estimate]


@dataclass(frozen=True)
class Rule:
    """What shows a number: it reaches `least`, and its interval lies above `beyond`.

    Attributes:
        least: The least value.
        beyond: What the interval must leave out, below it.
        reversed_below: The interval below this shows the opposite; None: nothing does.
    """

    least: float
    beyond: float
    reversed_below: float | None = None

    def verdict(self, value: float, low: float, high: float) -> str:
        """Judges a number."""
        if not np.isfinite(value):
            return NOT_MEASURED
        if value >= self.least and (low > self.beyond or np.isneginf(self.beyond)):
            return SHOWN
        return REVERSED if self.reversed_below is not None and high < self.reversed_below else NOT_SHOWN


# DPO moves behaviour further per squared norm (H4).
DPO_FURTHER = Rule(8, 4, 8)


@dataclass(frozen=True)
class Verdict:
    """Verdict on a part of a hypothesis.

    Attributes:
        part: The part, such as `H1a`.
        says: What was measured.
        value: The number.
        low: Lower end of its 95% interval.
        high: Upper end.
        unseen: The number without the runs that suggested the hypothesis; NaN where there are none.
        without_low: The least of the numbers without each draw of the data; NaN where there is one draw.
        without_high: The largest of them.
        p: p of a test against none, shown and decided by nothing.
        verdict: `shown` only if it is so with all runs, without the seen ones, and without each draw.
    """

    part: str
    says: str
    value: float
    low: float
    high: float
    unseen: float
    p: float
    verdict: str
    without_low: float = float("nan")
    without_high: float = float("nan")


def verdicts(found: Mapping[str, Any]) -> pd.DataFrame:
    """Judges every part of which there are numbers.

    Args:
        found: The numbers (`page.numbers`).

    Returns:
        A row for each `Verdict`, and `model`.
    """
    rows: list[dict[str, Any]] = []
    for model in ("embedded", "smollm2"):
        if model in found:
            rows += [{"model": model, **vars(one)} for one in _of_model(found[model])]
    geometry = found.get("full", {}).get("geometry")
    if geometry is not None:
        rows.append({"model": "embedded", **vars(_suite("H3b", geometry, None, 0.9, -np.inf, ratios=False))})
    says = "KL ÷ ‖ΔW‖² of DPO over the median"
    if (one_rate := found.get("one_rate")) is not None:
        table = one_rate["kl_per_norm"]
        ratio, by_draw = _ratio(table, "dpo"), table.set_index("loss").at["dpo", "by_draw"]
        rows.append({"model": "embedded", **vars(_of_draws("H4b", f"{says}, one rate", ratio, by_draw, Rule(2, 1)))})
        says_norm, norm = "DPO's norm over SFT's at one rate", one_rate["norm"]
        one = _of_draws("H6", says_norm, norm["ratio"], norm["by_draw"], Rule(0.5, 0.5, 0.5))
        rows.append({"model": "embedded", **vars(one)})
    if "equal_norm" in found:
        ratio = _ratio(found["equal_norm"]["kl_per_norm"], "dpo")
        one = _judged("H4, equal norm", f"{says}, equal norm", ratio, None, DPO_FURTHER)
        rows.append({"model": "embedded", **vars(one)})
    rows += [{"model": "embedded", **vars(one)} for one in _matchings(found.get("matchings", {}))]
    columns = ["model", "part", "says", "value", "low", "high", "unseen", "p", "verdict", "without_low", "without_high"]
    return pd.DataFrame(rows, columns=columns)


def _of_model(found: Mapping[str, Any]) -> list[Verdict]:
    unseen = found.get("unseen")

    def judged(
        part: str, says: str, number: Callable[[Mapping[str, Any]], Estimate], rule: Rule, **also: Any
    ) -> Verdict:
        without = [number(of).value for of in found["without_draw"].values()]
        return _judged(part, says, number(found), number(unseen) if unseen else None, rule, without=without, **also)

    rows = [
        judged("H1a", "share of the data less that of the loss", lambda of: _share(of, "data_less_loss"),
               Rule(LEAST_DIFFERENCE, 0, 0)),
        judged("H1, beside", "two losses on one draw less one loss on two", lambda of: _share(of, "two_less_one"),
               Rule(0, 0, 0)),
        judged("H1b", "share of related pairs of which less than half persists", lambda of: of["persisting"],
               Rule(0.5, 0.5, 0.5)),
        judged("H1, as the loss's", "share of the data less that of the loss with both",
               lambda of: _share(of, "data_less_all_of_loss"), Rule(0, 0, 0)),
        judged("H1c", "two losses on one draw less one loss on two, of SFT, RFT, DFT and RIFT",
               lambda of: of["likelihoods"]["difference"], Rule(0, 0, 0)),
    ]  # fmt: skip
    if "decided" in found:
        says, rule = "r of gradients before step 1 and ends", Rule(0.9, 0.8, 0.9)
        rows.append(judged("H2", says, lambda of: of["decided"]["r"], rule, p=found["decided"]["p"]))
        if found["decided"]["difference"] is not None:
            says = "r of gradients and ends of two losses on two draws"
            rows.append(judged("H2, two draws", says, _decided("r_across"), rule))
            says = "r on the same draw less r on another"
            rows.append(judged("H2b", says, _decided("difference"), Rule(0, 0, 0)))
    if "geometry" in found:
        of_unseen = unseen["geometry"] if unseen else None
        without = [of["geometry"] for of in found["without_draw"].values()]
        rows.append(_suite("H3", found["geometry"], of_unseen, 0.95, 0.9, ratios=True, without=without))
        rows.append(_principal(found["geometry"], of_unseen, without))
    says = "KL ÷ ‖ΔW‖² over the median of the pointwise losses"
    over_draws = " (interval over draws)" if found["without_draw"] else ""
    rows.append(judged("H4", f"DPO's {says}{over_draws}", lambda of: _ratio(of["kl_per_norm"], "dpo"), DPO_FURTHER))
    pair_losses = [
        judged("H4c", f"least {says} of {', '.join(PAIR_LOSSES)}", _ratio_of(loss), Rule(4, 1))
        for loss in PAIR_LOSSES
        if loss in set(found["kl_per_norm"]["loss"])
    ]
    if pair_losses:
        # All must be shown.
        rows.append(min(pair_losses, key=lambda one: (one.verdict == SHOWN, one.value)))
    differences = found["function_less_weights"]
    for name in ("draw", "start"):
        if name in differences:
            says = f"similarity of one loss on two {name}s, function less weights"
            rows.append(judged(f"H5, {name}", says, _function_less_weights(name), Rule(0, 0, 0)))
    if "start_by_inputs" in differences:
        says = "function of one loss on two starts less weights as inputs meet them"
        rows.append(judged("H5, start, by inputs", says, _function_less_weights("start_by_inputs"), Rule(0, 0, 0)))
    if "function_start" in differences:
        function, weights_start = differences["function_start"], differences["weights_start"]
        holds = function.value >= 0.7 and weights_start.value <= 0.2
        says = f"function from two starts (weights: {weights_start.value:.2f})"
        rows.append(judged("H5b", says, _function_less_weights("function_start"), Rule(0.7, -np.inf), holds=holds))
    return rows


_UNKNOWN = Estimate(float("nan"), float("nan"), float("nan"))


def _of_draws(part: str, says: str, ratio: Estimate, by_draw: Mapping[str, float], rule: Rule) -> Verdict:
    """Judges a geometric mean over draws, of runs none of which was seen."""
    values = pd.Series(by_draw)
    without = [float(np.exp(np.log(values.drop(draw)).mean())) for draw in by_draw if len(by_draw) > 1]
    return _judged(part, f"{says} (interval over draws)", ratio, ratio, rule, without=without)


def _judged(
    part: str, says: str, one: Estimate, unseen: Estimate | None, rule: Rule, *, holds: bool = True,
    p: float = float("nan"), without: Sequence[float] = (),
) -> Verdict:  # fmt: skip
    """Judges a number.

    Either way, what is said must also be so without the seen runs (`unseen`; None: there are no others, so that nothing
    is shown), and the number must stay on its side without each draw; if it cannot be computed then, nothing is shown.
    """
    verdict = rule.verdict(one.value, one.low, one.high)
    # NaN, of what compares two draws where there are no more, is on neither side.
    left = np.array(without, dtype=float)
    if verdict == SHOWN and not (holds and (left > rule.beyond).all()):
        verdict = NOT_SHOWN
    if verdict == REVERSED and not (left < rule.least).all():
        verdict = NOT_SHOWN
    if verdict in (SHOWN, REVERSED):
        again = None if unseen is None else rule.verdict(unseen.value, unseen.low, unseen.high)
        verdict = verdict if again == verdict else NOT_SHOWN
    value_unseen = unseen.value if unseen is not None else float("nan")
    # The p of an estimate is against 0.
    p = one.p if np.isnan(p) and rule.beyond == 0 else p
    known = left[np.isfinite(left)]
    least, largest = (known.min(), known.max()) if len(known) else (float("nan"), float("nan"))
    return Verdict(part, says, one.value, one.low, one.high, value_unseen, p, verdict, float(least), float(largest))


def _decided(name: str) -> Number:
    return lambda found: found.get("decided", {}).get(name) or _UNKNOWN


def _share(found: Mapping[str, Any], name: str) -> Estimate:
    row = found["shares"]["weights"].set_index("share").loc[name]
    return Estimate(row["value"], row["low"], row["high"], row["p"])


def _ratio_of(loss: str) -> Number:
    return lambda found: _ratio(found["kl_per_norm"], loss)


def _function_less_weights(name: str) -> Number:
    return lambda found: found["function_less_weights"].get(name, _UNKNOWN)


def _ratio(table: pd.DataFrame, loss: str) -> Estimate:
    known = table[table["loss"] == loss]
    return Estimate(*known.iloc[0][["ratio", "low", "high"]]) if len(known) else _UNKNOWN


def _suite(
    part: str, table: pd.DataFrame, unseen: pd.DataFrame | None, least: float, beyond: float, *, ratios: bool,
    without: Sequence[pd.DataFrame] = (),
) -> Verdict:  # fmt: skip
    """Judges the geometry suite by its least R², and by all ratios to rotated copies."""

    def least_of(of: pd.DataFrame) -> Estimate:
        row = of[of["measure"].isin(SUITE)].sort_values("r2").iloc[0]
        return Estimate(row["r2"], row["low"], row["high"])

    def is_within(of: pd.DataFrame) -> bool:
        own = of[of["measure"].isin(SUITE)]
        return bool((own["least_ratio"] >= 0.8).all() and (own["largest_ratio"] <= 1.25).all())

    own = table[table["measure"].isin(SUITE)]
    holds = not ratios or all(is_within(of) for of in (table, *([] if unseen is None else [unseen])))
    of_measure = own.set_index("measure")
    says = f"least R² of the suite with log‖ΔW‖, of {_MEASURES[of_measure['r2'].idxmin()]}"
    most = _MEASURES[of_measure["largest_ratio"].idxmax()]
    of_copies = f"{own['least_ratio'].min():.2f} to {own['largest_ratio'].max():.2f}, most of {most}"
    says += f" (ratios to copies {of_copies})" * ratios
    of_unseen = least_of(unseen) if unseen is not None else None
    values = [least_of(of).value for of in without]
    return _judged(part, says, least_of(table), of_unseen, Rule(least, beyond), holds=holds, without=values)


def _principal(table: pd.DataFrame, unseen: pd.DataFrame | None, without: Sequence[pd.DataFrame]) -> Verdict:
    """Judges the share in W0's directions by its R², with its interval below .7, and its least ratio to chance."""
    every = [
        of.set_index("measure").loc["principal_left"] for of in (table, *([] if unseen is None else [unseen]), *without)
    ]
    row = every[0]
    with_interval = every[: len(every) - len(without)]
    is_shown = all(of["r2"] < 0.7 and of["least_ratio"] > 1 for of in every)
    is_shown = is_shown and all(of["high"] < 0.7 for of in with_interval)
    says = f"R² of the share in W0's directions with log‖ΔW‖ (least ratio to chance {row['least_ratio']:.2f})"
    r2 = [one["r2"] for one in every]
    of_draws = r2[len(r2) - len(without) :] or [float("nan")]
    return Verdict("H3c", says, row["r2"], row["low"], row["high"], r2[1] if unseen is not None else float("nan"),
                   float("nan"), SHOWN if is_shown else NOT_SHOWN, min(of_draws), max(of_draws))  # fmt: skip


def _matchings(judged: Mapping[str, Mapping[str, Finding]]) -> list[Verdict]:
    """Counts under how many matchings each finding holds (H6); all are of seen draw and start, which shows nothing."""
    rows = []
    differs = sum(found["F5"].from_base for found in judged.values())
    expected = {"H6b": "F3", "H6b, to SFT": TO_SFT, "H6c": "F1", "H6d": "F2", "H6e": "F5"}
    for part, finding in expected.items() if judged else ():
        held = sum(found[finding].verdict == HOLDS for found in judged.values())
        says = f"matchings of {len(judged)} under which {finding} holds"
        says += f" (DPO differs from the base under {differs})" * (finding == "F5")
        nan = float("nan")
        rows.append(Verdict(part, says, float(held), nan, nan, nan, nan, NOT_SHOWN))
    return rows
