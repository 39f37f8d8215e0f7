"""Arms: runs that differ only in their seeds, and the SFT arm or run that each is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from losslens.analysis.cohort import Cohort, ComparedAdapter, Diverged, Unfinished
from losslens.analysis.manifests import StartedFacts
from losslens.analysis.pairs import Pair
from losslens.core.errors import InputError
from losslens.core.mappings import flatten
from losslens.runs.run import arm_of

# Keys that do not distinguish arms of one method and learning rate, or that have their own columns.
_NOT_SETTINGS = ("format", "seed", "init_seed", "method.name", "learning_rate")


@dataclass
class Arm:
    """One configuration and its runs.

    Attributes:
        facts: The manifest of one of its runs.
        settings: Settings that distinguish it from other arms of its method and `lr`, such as `method.beta=0.3`; may be
            empty.
        learning_rates: Names of the `lr` options that give its learning rate, its own first.
        members: Its finished runs.
        diverged: Its runs that diverged.
        unfinished: Its runs that failed or have not finished, where rates are chosen.
    """

    facts: StartedFacts
    settings: str = ""
    learning_rates: list[str] = field(default_factory=list)
    members: list[ComparedAdapter] = field(default_factory=list)
    diverged: list[Diverged] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The name of its method."""
        return self.facts.method

    @property
    def lr(self) -> str:
        """The name of its `lr` option."""
        return self.facts.config.lr.name

    @property
    def learning_rate(self) -> float:
        """Its peak learning rate."""
        return self.facts.learning_rate

    @property
    def base_rate(self) -> float:
        """The base learning rate (`lr.peak`), of which its own is a multiple."""
        return self.facts.config.lr.peak

    @property
    def at_conventional_rate(self) -> bool:
        """True if its learning rate is the conventional one of its loss, whatever its `lr` option."""
        usual = self.facts.config.lr.model_copy(update={"factor": None})
        return self.learning_rate == usual.of(self.facts.conventional_lr_scale)

    @property
    def sweeps(self) -> set[str]:
        """The sweeps of its runs, from the prefixes of their names; one empty name if there is a single sweep."""
        runs: list[ComparedAdapter | Diverged] = [*self.members, *self.diverged]
        return {run.name.rpartition("/")[0] for run in runs}

    @property
    def values(self) -> dict[str, Any]:
        """All settings of its runs except the seeds, flattened."""
        return flatten(self.facts.settings)

    @property
    def on_any_data(self) -> str:
        """Hash shared by arms that differ only in their rollouts."""
        return arm_of({key: value for key, value in self.facts.identity.items() if key != "rollouts"})

    def name(self, lr: str | None = None) -> str:
        """Returns `dpo-matched`, followed by the settings that distinguish it from similar arms."""
        return " ".join(part for part in (f"{self.method}-{lr or self.lr}", self.settings) if part)

    def distance(self, other: Arm) -> int:
        """Counts the settings, other than method and learning rate, in which it differs from `other`.

        `group_statistics` counts as the method's, since only those with columns have it.
        """
        ours, theirs = self.values, other.values
        keys = {key for key in ours.keys() | theirs.keys() if not key.startswith("method.")} - {
            *_NOT_SETTINGS,
            "group_statistics",
        }
        return sum(ours.get(key) != theirs.get(key) for key in keys)


def arms_of(cohort: Cohort) -> list[Arm]:
    """Groups all runs into arms, in the order of the tables."""
    by_configuration: dict[str, Arm] = {}
    for member in cohort.members:
        if member.facts is not None:
            by_configuration.setdefault(member.facts.configuration, Arm(member.facts)).members.append(member)
    for run in cohort.diverged:
        by_configuration.setdefault(run.facts.configuration, Arm(run.facts)).diverged.append(run)
    arms = list(by_configuration.values())
    for arm in arms:
        similar = [other for other in arms if (other.method, other.lr) == (arm.method, arm.lr)]
        arm.settings = settings_among(arm, similar)
    for arm in arms:
        arm.learning_rates = [arm.lr, *_other_names(arm, arms)]
    return arms


def arm_names(arms: Sequence[Arm], cohort: Cohort) -> dict[str, str]:
    """Maps the name of each run to that of its arm; an external adapter is its own arm.

    Raises:
        InputError: An external adapter has the name of an arm.
    """
    names = {member.name: member.name for member in cohort.members}
    taken = {arm.name(lr) for arm in arms for lr in arm.learning_rates}
    for member in cohort.members:
        if member.facts is None and member.name in taken:
            raise InputError(f"adapters.{member.name}: the name is already taken by a loss of the runs")
    for arm in arms:
        runs: list[ComparedAdapter | Diverged] = [*arm.members, *arm.diverged]
        names |= {run.name: arm.name() for run in runs}
    return names


def sft_partners(arms: Sequence[Arm], reference: ComparedAdapter) -> dict[str, ComparedAdapter]:
    """Maps the name of each run to the SFT run it is compared with by measures of chosen pairs.

    The SFT run comes from the SFT arm whose other settings are nearest to those of the run's arm; of several, the one
    at the reference's learning rate.
    """
    partners = {}
    candidates = [arm for arm in arms if arm.method == "sft" and arm.members]
    for arm in arms:
        sft = nearest(arm, candidates, reference.facts.learning_rate if reference.facts else None)
        runs: list[ComparedAdapter | Diverged] = [*arm.members, *arm.diverged]
        for run in runs:
            other = partner(run, sft)
            if other:
                partners[run.name] = other
    return partners


def nearest(arm: Arm, candidates: Iterable[Arm], learning_rate: float | None) -> Arm | None:
    """Returns the candidate with the fewest settings different from `arm`; of several, the first at `learning_rate`."""
    ordered = sorted(candidates, key=lambda other: (arm.distance(other), other.learning_rate != learning_rate))
    return ordered[0] if ordered else None


def repeats(arm: Arm) -> list[Pair]:
    """Returns the pairs of the arm's runs that share their initial adapter."""
    return [
        (a.name, b.name)
        for number, a in enumerate(arm.members)
        for b in arm.members[number + 1 :]
        if a.facts and b.facts and a.facts.start == b.facts.start
    ]


def partner(run: ComparedAdapter | Diverged, arm: Arm | None) -> ComparedAdapter | None:
    """Returns the run of `arm` at the next seed with the same initial adapter, or else the run of the same seeds.

    Seeds wrap around, so with n seeds each run has one partner with different batches.
    """
    if arm is None or run.facts is None:
        return None
    facts = {s.name: s.facts for s in arm.members if s.facts}
    initial, (seed, _) = run.facts.start, run.facts.seeds
    others = [s for s in arm.members if s.name in facts and facts[s.name].start == initial]
    others = [s for s in others if facts[s.name].seeds[0] != seed]
    if others:
        return min(others, key=lambda s: (facts[s.name].seeds[0] < seed, facts[s.name].seeds[0]))
    return next((s for s in arm.members if s.name in facts and facts[s.name].seeds == run.facts.seeds), None)


def settings_among(arm: Arm, similar: Sequence[Arm]) -> str:
    """Returns the settings in which `arm` differs from others: `learning_rate=0.001 method.beta=0.3`; may be empty."""
    settings = [other.values for other in similar]
    keys = sorted({key for values in settings for key in values} - set(_NOT_SETTINGS[:-1]))
    # Full fine-tuning has no adapter, and so none of an adapter's settings.
    having = {key: [v for v in settings if key in v or not key.startswith("lora.")] for key in keys}
    differing = [key for key in keys if len({repr(values.get(key)) for values in having[key]}) > 1]
    shown = [key for key in differing if key in arm.values or not key.startswith(("adapter", "lora."))]
    return " ".join(f"{key}={_shortened(arm.values.get(key))}" for key in shown)


def _shortened(value: Any) -> str:
    """Shortens a hash to its first 8 digits."""
    text = str(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def _other_names(arm: Arm, arms: Sequence[Arm]) -> list[str]:
    """Returns the other `lr` options of the sweep that give this arm's learning rate, so that they share its runs."""
    siblings = [other for other in arms if other.base_rate == arm.base_rate and other.sweeps & arm.sweeps]
    taken = {other.lr for other in siblings if (other.method, other.settings) == (arm.method, arm.settings)}
    options = {other.lr: other.facts.config.lr for other in siblings}
    scale = arm.facts.conventional_lr_scale
    return sorted(name for name, lr in options.items() if name not in taken and lr.of(scale) == arm.learning_rate)
