"""What the numbers say, in sentences; each has its figures and its ceiling, and none says more than they do.

Of directions the verdicts are those of `arm_pairs.csv`: nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from losslens.report.accuracy_findings import accuracies
from losslens.report.arm_comparison import arms as ablation_arms
from losslens.report.components import Finding
from losslens.report.loss_comparison import Compared, Comparison, Loss
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, listed, number, percent, rate
from losslens.tables.style import loss_title

# Which runs compare two losses, those first that say most.
_SEEDS = {
    "same init": "different seeds",
    "other": "different seeds and starts",
    "same seeds": "the same seeds",
    "same order": "one order and different starts",
    "": "unknown seeds",
}


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


def directions(comparison: Comparison) -> list[Finding]:
    """How each loss' update points along the reference's: the verdict, and the figures that it follows from."""
    reference = comparison.reference
    if reference is None:
        return []
    cosines = {loss: comparison.of("cosine", loss, reference) for loss in _shown(comparison, reference)}
    cosines = {loss: cosine for loss, cosine in cosines.items() if cosine.known}
    if not cosines:
        return []

    def noise(loss: Loss, kind: str) -> str:
        """What losses that are not like themselves show with themselves, which is why there is no ratio."""
        if kind != "too noisy to say" or not math.isnan(cosines[loss].level):
            return ""
        said = with_themselves(loss, reference, cosines[loss])
        return f" ({said})" if said else ""

    groups: dict[str, list[Loss]] = {}
    for loss in sorted(cosines, key=lambda loss: -cosines[loss].value):
        groups.setdefault(_kind(cosines[loss]), []).append(loss)
    name = reference.name
    sentences = []
    for kind, losses in groups.items():
        figures = listed([f"{loss.name} {_figures(cosines[loss], kind)}{noise(loss, kind)}" for loss in losses])
        one = len(losses) == 1
        sentences.append(
            {
                "one loss": f"{figures} cannot be told from {name}: one loss, as far as repeats tell",
                "related": f"{figures} {'is' if one else 'are'} related to {name}, not one loss with it",
                "related or one": f"{figures} {'is' if one else 'are'} related to {name}, perhaps one loss with it",
                "nothing in common": f"{figures} {'has' if one else 'have'} nothing in common with {name}",
                "opposed": f"{figures} {'is' if one else 'are'} opposed to {name}",
                "too noisy to say": f"{figures}: too noisy to say",
                "same batches": f"{figures}: runs of one seed, which share their batches; how near a loss is to itself "
                "is not known",
                "no repeat": f"{figures}: {_unknown([(loss, reference, cosines[loss]) for loss in losses])}",
                "two seeds": f"{figures}: two seeds give no interval, and so no verdict",
            }[kind]
        )
    return [Finding(f"Direction (cosine of ΔW): {'; '.join(sentences)}.", "explore")]


def _kind(cosine: Compared) -> str:
    """The verdict, of `too few seeds` what there are too few of."""
    if cosine.verdict == "related" and cosine.high >= 1:
        return "related or one"
    if cosine.verdict not in ("", "too few seeds"):
        return cosine.verdict
    if cosine.pairing in ("same seeds", "same order"):
        return "same batches"
    return "no repeat" if math.isnan(cosine.relative) else "two seeds"


def with_themselves(first: Loss, second: Loss, cosine: Compared) -> str:
    """`SFT with itself 0.820, RFT with itself 0.830`: by repeats of the kind by which the two are compared."""
    own = zip((first, second), cosine.own, strict=True)
    return ", ".join(f"{loss.name} with itself {number(value)}" for loss, value in own if not math.isnan(value))


def _unknown(pairs: Sequence[tuple[Loss, Loss, Compared]]) -> str:
    """Of which losses it is not known how near they are to themselves."""
    own = [each for *losses, cosine in pairs for each in zip(losses, cosine.own, strict=True)]
    names = list(dict.fromkeys(loss.name for loss, value in own if math.isnan(value)))
    return f"how near {listed(names)} {'is to itself' if len(names) == 1 else 'are to themselves'} is not known"


def _figures(cosine: Compared, kind: str = "") -> str:
    """`0.68 of 0.83, a ratio of 0.83 [0.74, 0.91]`; of what has no ceiling, or is nothing, the null."""
    null = "" if math.isnan(cosine.null) else f" (null {number(cosine.null)})"
    beside = "" if math.isnan(cosine.level) else f" of {number(cosine.level)}, a ratio of {ratio(cosine)}"
    return f"{number(cosine.value)}{null * (kind == 'nothing in common' or not beside)}{beside}"


def ratio(cosine: Compared) -> str:
    """`0.83 [0.74, 0.91]`; without an interval the range of the cosines."""
    if not math.isnan(cosine.low):
        return f"{number(cosine.relative, 2)} [{number(cosine.low, 2)}, {number(cosine.high, 2)}]"
    over = f" (cosines {number(cosine.lowest)} to {number(cosine.highest)})" if cosine.pairs > 1 else ""
    return f"{number(cosine.relative, 2)}{over}"


def nearest(comparison: Comparison) -> list[Finding]:
    """The two methods that are most alike, at whatever rates, where the reference is not one of them.

    By the ratio where all have one, else by the cosine, of those that are compared by one kind of pairs of runs: runs
    of one seed read higher than others.
    """
    reference, losses = comparison.reference, comparison.losses
    found = [
        (comparison.of("cosine", first, second), first, second)
        for place, first in enumerate(losses)
        for second in losses[place + 1 :]
        if first.method != second.method
    ]
    found = [each for each in found if each[0].known]
    kinds = {cosine.pairing for cosine, *_ in found}
    found = [
        each for each in found if each[0].value > 0 and each[0].verdict not in ("nothing in common", "too noisy to say")
    ]
    pairing = next((kind for kind in _SEEDS if any(cosine.pairing == kind for cosine, *_ in found)), None)
    found = [each for each in found if each[0].pairing == pairing]
    if not found:
        return []
    relative = not any(math.isnan(cosine.relative) for cosine, *_ in found)
    cosine, first, second = max(found, key=lambda each: each[0].relative if relative else each[0].value)
    if reference in (first, second):
        return []
    said = {
        "one loss": "one loss, as far as repeats tell",
        "related": "related, not one loss",
        "related or one": "related, perhaps one loss",
        "same batches": "of runs of one seed, which share their batches",
        "no repeat": _unknown([(first, second, cosine)]),
        "two seeds": "two seeds give no interval",
    }[_kind(cosine)]
    of = f", of those compared by runs of {_SEEDS[pairing]}," if pairing is not None and len(kinds) > 1 else ""
    text = f"The two methods most alike{of} are {first.name} and {second.name}: {_figures(cosine)} ({said})."
    return [Finding(text, "explore")]


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


def learning_rates(analysis: AnalysisFolder) -> list[Finding]:
    """A method at the reference's learning rate and at its own, where both were trained."""
    arms = ablation_arms(analysis)
    arms = arms[arms["norm"].notna()] if len(arms) else arms
    references = arms[arms["arm"] == arms["sft"]] if len(arms) else arms
    return [
        found
        for _, sft in references.iterrows()
        for found in _at_the_rate_of(sft, arms[arms["sft"] == sft["arm"]], len(references) > 1)
    ]


def _at_the_rate_of(sft: pd.Series, arms: pd.DataFrame, several: bool) -> list[Finding]:
    """What methods do at the rate of one SFT arm, of the arms that are held against it."""
    said = []
    name = sft["label"] if several else "SFT"
    for method, own in arms[arms["method"] != "sft"].groupby("method", sort=False):
        usual = own[own["lr"].str.split(" = ").map(lambda names: "conventional" in names)]
        matched = own[own["learning_rate"] == sft["learning_rate"]]
        # Only where the rate is a question: the method is usually trained at another one than SFT.
        if len(usual) != 1 or len(matched) != 1 or usual.index[0] == matched.index[0]:
            continue
        there, here = matched.iloc[0], usual.iloc[0]
        ceilings = [number(arm["cosine_to_sft_ceiling"]) for arm in (there, here)]
        beside = [f" of {ceiling}" * (ceiling != NOTHING) for ceiling in ceilings]
        parts = [
            f"a cosine to {name} of {number(there['cosine_to_sft'])}{beside[0]} (at {rate(here['learning_rate'])} "
            f"{number(here['cosine_to_sft'])}{beside[1]})",
            f"a norm of {number(there['norm'])} ({number(here['norm'])}; {name} {number(sft['norm'])})",
        ]
        if not pd.isna(there["accuracy"]):
            parts.append(
                f"an accuracy of {percent(there['accuracy'])} ({percent(here['accuracy'])}; "
                f"{name} {percent(sft['accuracy'])})"
            )
        said.append(
            Finding(
                f"At SFT's learning rate ({rate(there['learning_rate'])}) "
                f"{loss_title(str(method))} has {listed(parts)}.",
                "learning-rate",
            )
        )
    return said


def connectivity(comparison: Comparison) -> list[Finding]:
    """The largest barrier on the straight line between two updates, and the last layer's CKA to the reference."""
    pairs = comparison.pairs
    measured = pairs[pairs["barrier_chord"].notna() & (pairs["arm_a"] != pairs["arm_b"])]
    sentences = []
    if len(measured):
        worst = measured.loc[measured["barrier_chord"].idxmax()]
        losses = {loss.arm: loss for loss in comparison.losses}
        first, second = losses[worst["arm_a"]], losses[worst["arm_b"]]
        level = comparison.of("barrier_chord", first, second).level
        beside = "" if math.isnan(level) else f"; repeat level {number(level)}"
        height = f"{number(worst['barrier_chord'])} nats a token"
        over = f"{len(measured)} pair{'s' * (len(measured) != 1)} of runs"
        if round(worst["barrier_chord"], 3) <= 0:
            sentences.append(f"no loss barrier to the chord between two updates (largest of {over}: {height}{beside})")
        else:
            interval = f"95% {number(worst['barrier_chord_low'])} … {number(worst['barrier_chord_high'])}"
            sentences.append(
                f"the largest loss barrier to the chord between two updates, of {over}, is {height} "
                f"({first.name} and {second.name}, {interval}{beside})"
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
                f"the last layer's hidden states differ most from {reference.name}'s in {least.name} "
                f"(CKA {number(ckas[least].value, 4)}{beside})"
            )
    return [Finding(f"Function: {'; '.join(sentences)}.", "explore")] if sentences else []


def _shown(comparison: Comparison, reference: Loss) -> list[Loss]:
    """Of each method the losses at the rate name of the reference, where it has one of that name; else all of them."""
    others = comparison.others
    named = {loss.method for loss in others if loss.lr == reference.lr}
    return [loss for loss in others if loss.lr == reference.lr or loss.method not in named | {reference.method}]
