"""Findings: the main results in sentences, each with its numbers, its null and its ceiling.

Verdicts on directions are copied from `arm_pairs.csv`; nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from losslens.report.accuracy_findings import accuracies
from losslens.report.arm_comparison import arm_rows
from losslens.report.components import Finding
from losslens.report.loss_comparison import ComparedLoss, LossComparison, LossPairValue
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, listed, number, percent, rate
from losslens.tables.style import loss_title

# The pairings by which two losses are compared, the most informative first, and what the runs of each have.
_PAIRINGS = {
    "same init": "different seeds",
    "other": "different seeds and initial adapters",
    "same seeds": "the same seeds",
    "same order": "the same data order and different initial adapters",
    "": "unknown seeds",
}
_SAME_BATCHES = "compared on runs of the same seed, which share their batches"


def findings(analysis: AnalysisFolder, comparison: LossComparison) -> list[Finding]:
    """Returns the findings, each with the section that shows its table."""
    return [
        *directions(comparison),
        *nearest(comparison),
        *sizes(comparison),
        *learning_rates(analysis),
        *accuracies(analysis, comparison),
        *connectivity(comparison),
    ]


def directions(comparison: LossComparison) -> list[Finding]:
    """Compares the direction of each loss's update with the reference's: the verdict and the numbers behind it."""
    reference = comparison.reference
    if reference is None:
        return []
    cosines = {loss: comparison.of("cosine", loss, reference) for loss in _shown(comparison, reference)}
    cosines = {loss: cosine for loss, cosine in cosines.items() if cosine.known}
    if not cosines:
        return []

    def with_numbers(loss: ComparedLoss, kind: str) -> str:
        cosine = cosines[loss]
        # Repeats that are too low explain why there is no ceiling.
        noisy = kind == "too noisy to say" and math.isnan(cosine.level)
        repeats = repeats_of(loss, reference, cosine) if noisy else ""
        return f"{loss.name} {_numbers(cosine, kind, repeats)}"

    groups: dict[str, list[ComparedLoss]] = {}
    for loss in sorted(cosines, key=lambda loss: -cosines[loss].value):
        groups.setdefault(_kind(cosines[loss]), []).append(loss)
    name = reference.name
    sentences = []
    for kind, losses in groups.items():
        subject = listed([with_numbers(loss, kind) for loss in losses])
        is_, has = ("is", "has") if len(losses) == 1 else ("are", "have")
        sentences.append(
            {
                "one loss": f"{subject} {is_} indistinguishable from {name}: one loss, as far as the repeats can tell",
                "related": f"{subject} {is_} related to {name} but not the same loss",
                "related or one": f"{subject} {is_} related to {name} and may be the same loss",
                "nothing in common": f"{subject} {has} nothing in common with {name}",
                "opposed": f"{subject} {is_} opposed to {name}",
                "too noisy to say": f"{subject}: too noisy to say",
                "same batches": f"{subject}: {_SAME_BATCHES}, so there is no ceiling and no verdict",
                "no repeat": f"{subject}: {_no_repeat([(loss, reference, cosines[loss]) for loss in losses])}",
                "two seeds": f"{subject}: two seeds give no interval and so no verdict",
            }[kind]
        )
    return [Finding(f"Direction (cosine of ΔW): {'; '.join(sentences)}.", "explore")]


def _kind(cosine: LossPairValue) -> str:
    """Returns the verdict; for `too few seeds`, the kind of repeat that is missing."""
    if cosine.verdict == "related" and cosine.high >= 1:
        return "related or one"
    if cosine.verdict not in ("", "too few seeds"):
        return cosine.verdict
    if cosine.pairing in ("same seeds", "same order"):
        return "same batches"
    return "no repeat" if math.isnan(cosine.relative) else "two seeds"


def repeats_of(first: ComparedLoss, second: ComparedLoss, cosine: LossPairValue) -> str:
    """Returns `repeat of SFT 0.820, repeat of RFT 0.830`: the repeats from which the ceiling of the two is made."""
    own = zip((first, second), cosine.own, strict=True)
    return ", ".join(f"repeat of {loss.name} {number(value)}" for loss, value in own if not math.isnan(value))


def _no_repeat(pairs: Sequence[tuple[ComparedLoss, ComparedLoss, LossPairValue]]) -> str:
    own = [of_loss for *losses, cosine in pairs for of_loss in zip(losses, cosine.own, strict=True)]
    names = list(dict.fromkeys(loss.name for loss, value in own if math.isnan(value)))
    repeats = f"the repeat of {names[0]} is" if len(names) == 1 else f"the repeats of {listed(names)} are"
    return f"no ceiling, since {repeats} not known"


def _numbers(cosine: LossPairValue, kind: str = "", repeats: str = "") -> str:
    """Returns `0.680 (ceiling 0.830, ratio 0.83 [0.74, 0.91])`; the null if there is no ceiling or nothing in common.

    Args:
        cosine: The cosine of two losses.
        kind: Its verdict.
        repeats: The two repeats as text, shown last if not empty.
    """
    has_ceiling = not math.isnan(cosine.level)
    parts = []
    if not math.isnan(cosine.null) and (kind == "nothing in common" or not has_ceiling):
        parts.append(f"null {number(cosine.null)}")
    if has_ceiling:
        parts += [f"ceiling {number(cosine.level)}", f"ratio {ratio(cosine, ', 95%')}"]
    parts += [repeats] * bool(repeats)
    return f"{number(cosine.value)} ({', '.join(parts)})" if parts else number(cosine.value)


def ratio(cosine: LossPairValue, label: str = "") -> str:
    """Returns `0.83 [0.74, 0.91]` with `label` before the interval; without an interval, the range of the cosines."""
    if not math.isnan(cosine.low):
        return f"{number(cosine.relative, 2)}{label} [{number(cosine.low, 2)}, {number(cosine.high, 2)}]"
    over = f", cosines {number(cosine.lowest)} to {number(cosine.highest)}" if cosine.pairs > 1 else ""
    return f"{number(cosine.relative, 2)}{over}"


def nearest(comparison: LossComparison) -> list[Finding]:
    """Names the two most similar losses, at any learning rates, unless one of them is the reference.

    Compares ratios if every pair has one, else cosines, and only among pairs of runs of one pairing: runs of the same
    seed read higher than others.
    """
    reference, losses = comparison.reference, comparison.losses
    candidates = [
        (comparison.of("cosine", first, second), first, second)
        for place, first in enumerate(losses)
        for second in losses[place + 1 :]
        if first.method != second.method
    ]
    candidates = [candidate for candidate in candidates if candidate[0].known]
    pairings = {cosine.pairing for cosine, *_ in candidates}
    candidates = [
        (cosine, first, second)
        for cosine, first, second in candidates
        if cosine.value > 0 and cosine.verdict not in ("nothing in common", "too noisy to say")
    ]
    pairing = next((kind for kind in _PAIRINGS if any(cosine.pairing == kind for cosine, *_ in candidates)), None)
    candidates = [candidate for candidate in candidates if candidate[0].pairing == pairing]
    if not candidates:
        return []
    relative = not any(math.isnan(cosine.relative) for cosine, *_ in candidates)
    cosine, first, second = max(candidates, key=lambda found: found[0].relative if relative else found[0].value)
    if reference in (first, second):
        return []
    verdict = {
        "one loss": "one loss, as far as the repeats can tell",
        "related": "related but not the same loss",
        "related or one": "related and perhaps the same loss",
        "same batches": _SAME_BATCHES,
        "no repeat": _no_repeat([(first, second, cosine)]),
        "two seeds": "two seeds give no interval",
    }[_kind(cosine)]
    among = f", among those compared at {_PAIRINGS[pairing]}," if pairing is not None and len(pairings) > 1 else ""
    names = f"{first.name} and {second.name}"
    text = f"The two most similar losses{among} are {names}: cosine {_numbers(cosine)}; {verdict}."
    return [Finding(text, "explore")]


def sizes(comparison: LossComparison) -> list[Finding]:
    """Compares the largest update with the smallest."""
    norms = comparison.runs.set_index("run")["norm"]
    means = {loss: float(norms[list(loss.runs)].mean()) for loss in comparison.losses if loss.runs}
    means = {loss: norm for loss, norm in means.items() if norm > 0}
    if len(means) < 2:
        return []
    largest, smallest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    factor = means[largest] / means[smallest]
    rates = (smallest.learning_rate, largest.learning_rate)
    at = (
        ""
        if rates[0] == rates[1] or any(map(math.isnan, rates))
        else f", trained at learning rates {rate(rates[0])} and {rate(rates[1])}"
    )
    spreads = [norms[list(loss.runs)] for loss in means if len(loss.runs) > 1]
    widest = max((float(values.max() / values.min()) for values in spreads), default=math.nan)
    beside = "" if math.isnan(widest) else f"; between runs of one loss the factor is at most {widest:.2f}"
    return [
        Finding(
            f"Size (‖ΔW‖): from {smallest.name}'s {number(means[smallest])} to {largest.name}'s "
            f"{number(means[largest])}, a factor of {factor:.{2 if factor < 1.95 else 1}f}{at}{beside}.",
            "runs",
        )
    ]


def learning_rates(analysis: AnalysisFolder) -> list[Finding]:
    """Compares each method at SFT's learning rate with the same method at its own, if both were trained."""
    arms = arm_rows(analysis)
    arms = arms[arms["norm"].notna()] if len(arms) else arms
    references = arms[arms["arm"] == arms["sft"]] if len(arms) else arms
    return [
        finding
        for _, sft in references.iterrows()
        for finding in _at_rate_of(sft, arms[arms["sft"] == sft["arm"]], len(references) > 1)
    ]


def _at_rate_of(sft: pd.Series, arms: pd.DataFrame, several: bool) -> list[Finding]:
    """Compares the arms whose reference is this SFT arm, at its learning rate and at their own."""
    sentences = []
    name = sft["label"] if several else "SFT"
    for method, own in arms[arms["method"] != "sft"].groupby("method", sort=False):
        usual = own[own["lr"].str.split(" = ").map(lambda names: "conventional" in names)]
        matched = own[own["learning_rate"] == sft["learning_rate"]]
        # Only for methods whose conventional rate is not SFT's.
        if len(usual) != 1 or len(matched) != 1 or usual.index[0] == matched.index[0]:
            continue
        at_sfts, at_own = matched.iloc[0], usual.iloc[0]
        ceilings = [number(arm["cosine_to_sft_ceiling"]) for arm in (at_sfts, at_own)]
        above = [f"ceiling {ceiling}" if ceiling != NOTHING else "" for ceiling in ceilings]
        own_rate = rate(at_own["learning_rate"])
        own_cosine = f"at {own_rate}: {number(at_own['cosine_to_sft'])}{', ' * bool(above[1])}{above[1]}"
        parts = [
            f"a cosine to {name} of {number(at_sfts['cosine_to_sft'])} ({above[0]}{'; ' * bool(above[0])}{own_cosine})",
            f"a norm of {number(at_sfts['norm'])} (at {own_rate}: {number(at_own['norm'])}; "
            f"{name}: {number(sft['norm'])})",
        ]
        if not pd.isna(at_sfts["accuracy"]):
            parts.append(
                f"an accuracy of {percent(at_sfts['accuracy'])} (at {own_rate}: {percent(at_own['accuracy'])}; "
                f"{name}: {percent(sft['accuracy'])})"
            )
        sentences.append(
            Finding(
                f"At SFT's learning rate ({rate(at_sfts['learning_rate'])}), "
                f"{loss_title(str(method))} has {listed(parts)}.",
                "learning-rate",
            )
        )
    return sentences


def connectivity(comparison: LossComparison) -> list[Finding]:
    """Reports the largest loss barrier between two losses, and the lowest last-layer CKA to the reference."""
    pairs = comparison.pairs
    measured = pairs[pairs["barrier_chord"].notna() & (pairs["arm_a"] != pairs["arm_b"])]
    sentences = []
    if len(measured):
        worst = measured.loc[measured["barrier_chord"].idxmax()]
        losses = {loss.arm: loss for loss in comparison.losses}
        first, second = losses[worst["arm_a"]], losses[worst["arm_b"]]
        level = comparison.of("barrier_chord", first, second).level
        beside = "" if math.isnan(level) else f"; repeat level {number(level)}"
        height = f"{number(worst['barrier_chord'])} nats per token"
        over = f"{len(measured)} measured pair{'s' * (len(measured) != 1)}"
        path = "on the straight path between any two runs of different losses"
        if round(worst["barrier_chord"], 3) <= 0:
            sentences.append(f"no loss barrier {path} (largest of {over}: {height}{beside})")
        else:
            interval = f"95% {number(worst['barrier_chord_low'])} … {number(worst['barrier_chord_high'])}"
            sentences.append(
                f"the largest loss barrier {path} is {height} "
                f"({first.name} and {second.name}, {interval}, of {over}{beside})"
            )
    reference = comparison.reference
    if reference is not None:
        ckas = {loss: comparison.of("cka_last", loss, reference) for loss in comparison.others}
        ckas = {loss: cka for loss, cka in ckas.items() if cka.known}
        if ckas:
            least = min(ckas, key=lambda loss: ckas[loss].value)
            ceiling = ckas[least].level
            beside = "" if math.isnan(ceiling) else f", ceiling {number(ceiling, 4)}"
            sentences.append(
                f"the last-layer hidden states that differ most from {reference.name}'s are those of {least.name} "
                f"(CKA {number(ckas[least].value, 4)}{beside})"
            )
    return [Finding(f"Function: {'; '.join(sentences)}.", "explore")] if sentences else []


def _shown(comparison: LossComparison, reference: ComparedLoss) -> list[ComparedLoss]:
    """Returns each method's losses at the reference's named learning rate, or all of them if it has none there."""
    others = comparison.others
    named = {loss.method for loss in others if loss.lr == reference.lr}
    return [loss for loss in others if loss.lr == reference.lr or loss.method not in named | {reference.method}]
