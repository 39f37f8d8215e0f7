"""What the numbers say, in sentences; each has its figures and its floor, and none says more than they do.

A loss is said not to be told from the reference where its cosine reaches the floor (that of the two losses with
themselves in another order of the data) or is nearer to it than twice the standard deviation over seeds, of the two.
Nothing is said of the direction of one whose sign does not hold over seeds.
"""

from __future__ import annotations

import math

import pandas as pd

from losslens.report.accuracy_findings import accuracies
from losslens.report.arms import arms as ablation_arms
from losslens.report.comparison import Average, Comparison, Loss
from losslens.report.folder import AnalysisFolder
from losslens.report.numbers import listed, number, percent, rate
from losslens.report.parts import Finding
from losslens.report.style import name_of


def findings(analysis: AnalysisFolder, comparison: Comparison) -> list[Finding]:
    """The sentences, each with the section that has the whole table."""
    return [
        *directions(comparison),
        *nearest(comparison),
        *sizes(comparison),
        *learning_rates(analysis),
        *accuracies(analysis, comparison),
        *connectivity(comparison),
    ]


# Directions


def directions(comparison: Comparison) -> list[Finding]:
    """How each loss' update points along the reference's, held against floor and null."""
    reference = comparison.reference
    if reference is None:
        return []
    cosines = {loss: comparison.average("cosine", loss, reference) for loss in _shown(comparison, reference)}
    cosines = {loss: cosine for loss, cosine in cosines.items() if cosine.known}
    if not cosines:
        return []
    floors = {loss: comparison.floor("cosine", loss, reference) for loss in cosines}
    floors = {loss: floor for loss, floor in floors.items() if reference in floor.of}
    groups: dict[str, list[Loss]] = {}
    for loss in sorted(cosines, key=lambda loss: -cosines[loss].value):
        groups.setdefault(_kind(cosines[loss], floors.get(loss)), []).append(loss)
    name = reference.name
    sentences = []
    for kind, losses in groups.items():
        whose = {loss: cosines[loss] for loss in losses}
        figures = _figures(whose, floors if kind in ("within", "farther", "once", "half") else {})
        plural = len(losses) > 1
        farther = f"{figures} {'are' if plural else 'is'} farther from {name} than another order of the data explains"
        sentences.append(
            {
                "within": f"{figures} cannot be told from {name} in another order of the data",
                "farther": farther,
                "once": f"{farther}, as far as one pair of runs{' each' * plural} tells",
                "half": f"{figures} {'are' if plural else 'is'} farther from {name} than {name} is from itself in "
                f"another order of the data, but how near {'they are to themselves' if plural else 'it is to itself'} "
                "is not known",
                "beyond": f"{figures} {'point' if plural else 'points'} along {name}, but how near {name} is to itself "
                "is not known",
                "unsure": f"{figures} {'change' if plural else 'changes'} too much with the seed to say "
                f"({_null(whose)})",
                "unrelated": f"{figures} {'have' if plural else 'has'} no more to do with {name} than chance "
                f"({_null(whose)})",
                "against": f"{figures} {'point' if plural else 'points'} away from {name}, by more than chance "
                f"({_null(whose)})",
            }[kind]
        )
    return [Finding(f"Direction (cosine of ΔW): {'; '.join(sentences)}.", "explore")]


def _kind(cosine: Average, floor: Average | None) -> str:
    spread = 0.0 if math.isnan(cosine.std) else cosine.std
    if not math.isnan(cosine.null) and abs(cosine.value) <= cosine.null:
        return "unrelated"
    if abs(cosine.value) <= 2 * spread:
        return "unsure"
    if cosine.value < 0:
        return "against"
    if floor is None or not floor.known:
        return "beyond"
    both = math.hypot(spread, 0.0 if math.isnan(floor.std) else floor.std)
    if cosine.value + 2 * both >= floor.value:
        return "within"
    if len(floor.of) == 1:
        return "half"
    return "once" if math.isnan(cosine.std) and math.isnan(floor.std) else "farther"


def _figures(cosines: dict[Loss, Average], floors: dict[Loss, Average]) -> str:
    """`RFT 0.723, RIFT 0.696 (floor 0.814)`; the floors each beside its own where they differ."""
    beside = {loss: number(floors[loss].value) for loss in cosines if loss in floors}
    one = len(set(beside.values())) == 1
    each = [
        f"{loss.name} {_with_std(cosine)}{'' if one or loss not in beside else f' (floor {beside[loss]})'}"
        for loss, cosine in cosines.items()
    ]
    return listed(each) + (f" (floor {next(iter(beside.values()))})" if one else "")


def _with_std(cosine: Average) -> str:
    return f"{number(cosine.value)}{'' if math.isnan(cosine.std) else f' ± {number(cosine.std)}'}"


def _null(cosines: dict[Loss, Average]) -> str:
    largest = max(cosine.null for cosine in cosines.values())
    return "null not known" if math.isnan(largest) else f"null {number(largest)}"


def nearest(comparison: Comparison) -> list[Finding]:
    """The two methods that are most alike, at whatever rates, where the reference is not one of them."""
    reference, losses = comparison.reference, comparison.losses
    found = [
        (comparison.average("cosine", first, second), first, second)
        for place, first in enumerate(losses)
        for second in losses[place + 1 :]
        if first.method != second.method
    ]
    found = [each for each in found if each[0].known]
    if not found:
        return []
    cosine, first, second = max(found, key=lambda each: each[0].value)
    if reference in (first, second) or _kind(cosine, None) in ("unrelated", "unsure", "against"):
        return []
    floor = comparison.floor("cosine", first, second)
    if not floor.known:
        said = "neither was trained in another order of the data, so there is no floor"
    elif _kind(cosine, floor) == "within":
        said = f"floor {number(floor.value)}: they cannot be told apart by their direction"
    else:
        said = f"floor {number(floor.value)}"
    return [
        Finding(
            f"The two methods most alike are {first.name} and {second.name}: {_with_std(cosine)} ({said}).", "explore"
        )
    ]


# Sizes


def sizes(comparison: Comparison) -> list[Finding]:
    """The largest and the smallest update."""
    norms = comparison.runs.set_index("run")["norm"]
    means = {loss: float(norms[list(loss.runs)].mean()) for loss in comparison.losses if loss.runs}
    means = {loss: norm for loss, norm in means.items() if norm > 0}
    if len(means) < 2:
        return []
    largest, smallest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    times = means[largest] / means[smallest]
    rates = (smallest.learning_rate, largest.learning_rate)
    at = (
        ""
        if rates[0] == rates[1] or any(map(math.isnan, rates))
        else f", trained at {rate(rates[0])} and {rate(rates[1])}"
    )
    spreads = [norms[list(loss.runs)] for loss in means if len(loss.runs) > 1]
    widest = max((float(values.max() / values.min()) for values in spreads), default=math.nan)
    beside = "" if math.isnan(widest) else f"; between runs of one loss it is {widest:.2f} at most"
    return [
        Finding(
            f"Size (‖ΔW‖): from {smallest.name}'s {number(means[smallest])} to {largest.name}'s "
            f"{number(means[largest])}, a factor of {times:.{2 if times < 1.95 else 1}f}{at}{beside}.",
            "runs",
        )
    ]


# The learning-rate-matched comparison


def learning_rates(analysis: AnalysisFolder) -> list[Finding]:
    """A method at the reference's learning rate and at its own, where both were trained."""
    arms = ablation_arms(analysis)
    arms = arms[arms["norm"].notna()] if len(arms) else arms
    sft = arms[(arms["method"] == "sft") & (arms["cosine_to_sft"] == 1)] if len(arms) else arms
    if sft.empty:
        return []
    reference = sft.iloc[0]
    said = []
    for method, own in arms[arms["method"] != "sft"].groupby("method", sort=False):
        usual = own[own["lr"].str.split(" = ").map(lambda names: "conventional" in names)]
        matched = own[own["learning_rate"] == reference["learning_rate"]]
        # Only where the rate is a question: the method is usually trained at another one than SFT.
        if len(usual) != 1 or len(matched) != 1 or usual.index[0] == matched.index[0]:
            continue
        there, here = matched.iloc[0], usual.iloc[0]
        floors = "" if pd.isna(there["cosine_to_sft_floor"]) else f"; floor {number(there['cosine_to_sft_floor'])}"
        parts = [
            f"a cosine to SFT of {number(there['cosine_to_sft'])} (at {rate(here['learning_rate'])} "
            f"{number(here['cosine_to_sft'])}{floors})",
            f"a norm of {number(there['norm'])} ({number(here['norm'])}; SFT {number(reference['norm'])})",
        ]
        if not pd.isna(there["accuracy"]):
            parts.append(
                f"an accuracy of {percent(there['accuracy'])} ({percent(here['accuracy'])}; "
                f"SFT {percent(reference['accuracy'])})"
            )
        said.append(
            Finding(
                f"At SFT's learning rate ({rate(there['learning_rate'])}) {name_of(str(method))} has {listed(parts)}.",
                "learning-rate",
            )
        )
    return said


# What the models compute


def connectivity(comparison: Comparison) -> list[Finding]:
    """The largest barrier on the straight line between two updates, and the last layer's CKA to the reference."""
    pairs = comparison.pairs
    measured = pairs[pairs["barrier_chord"].notna() & (pairs["arm_a"] != pairs["arm_b"])]
    sentences = []
    if len(measured):
        worst = measured.loc[measured["barrier_chord"].idxmax()]
        own = pairs.loc[pairs["barrier_chord"].notna() & (pairs["arm_a"] == pairs["arm_b"]), "barrier_chord"]
        floor = f"; same loss at other seeds {number(own.mean())}" if len(own) else ""
        height = f"{number(worst['barrier_chord'])} nats a token"
        over = f"{len(measured)} pair{'s' * (len(measured) != 1)} of runs"
        if round(worst["barrier_chord"], 3) <= 0:
            sentences.append(f"no loss barrier to the chord between two updates (largest of {over}: {height}{floor})")
        else:
            names = {loss.arm: loss.name for loss in comparison.losses}
            interval = f"95% {number(worst['barrier_chord_low'])} … {number(worst['barrier_chord_high'])}"
            sentences.append(
                f"the largest loss barrier to the chord between two updates, of {over}, is {height} "
                f"({names[worst['arm_a']]} and {names[worst['arm_b']]}, {interval}{floor})"
            )
    reference = comparison.reference
    if reference is not None:
        ckas = {loss: comparison.average("cka_last", loss, reference) for loss in comparison.others}
        ckas = {loss: cka for loss, cka in ckas.items() if cka.known}
        if ckas:
            least = min(ckas, key=lambda loss: ckas[loss].value)
            floor_ = comparison.floor("cka_last", least, reference)
            beside = f", floor {number(floor_.value, 4)}" if floor_.known else ""
            sentences.append(
                f"the last layer's hidden states differ most from {reference.name}'s in {least.name} "
                f"(CKA {number(ckas[least].value, 4)}{beside})"
            )
    return [Finding(f"Function: {'; '.join(sentences)}.", "explore")] if sentences else []


# Helpers


def _shown(comparison: Comparison, reference: Loss) -> list[Loss]:
    """Of each method the losses at the rate name of the reference, where it has one of that name; else all of them."""
    others = comparison.others
    named = {loss.method for loss in others if loss.lr == reference.lr}
    return [loss for loss in others if loss.lr == reference.lr or loss.method not in named | {reference.method}]
