"""The arms of a comparison: runs that differ in their seeds only, and the SFT run that each is held against."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from losslens.analysis.cohort import Cohort, ComparedAdapter, Diverged
from losslens.analysis.manifests import StartedFacts
from losslens.analysis.pairs import Pair
from losslens.core.errors import InputError
from losslens.runs.run import arm_of

# What does not tell the arms of one method and rate apart, or is told by other columns.
_NOT_SETTINGS = ("format", "seed", "init_seed", "method.name", "learning_rate")


@dataclass
class Arm:
    """One configuration and its runs.

    Attributes:
        facts: The manifest of one of them.
        settings: What tells it from the other arms of its method and `lr`, for example `method.beta=0.3`; may be empty.
        learning_rates: Names of the `lr` that give its learning rate, its own first.
        members: Its runs that have an end.
        diverged: Those that have none.
    """

    facts: StartedFacts
    settings: str = ""
    learning_rates: list[str] = field(default_factory=list)
    members: list[ComparedAdapter] = field(default_factory=list)
    diverged: list[Diverged] = field(default_factory=list)

    @property
    def method(self) -> str:
        """The name of its method."""
        return self.facts.method

    @property
    def lr(self) -> str:
        """The name under which its learning rate was asked for."""
        return self.facts.config.lr.name

    @property
    def learning_rate(self) -> float:
        """Its peak learning rate."""
        return self.facts.learning_rate

    @property
    def base_rate(self) -> float:
        """The rate that its own is a multiple of."""
        return self.facts.config.lr.peak

    @property
    def at_conventional_rate(self) -> bool:
        """Whether its rate is the usual one of its loss, whatever it was asked for as."""
        usual = self.facts.config.lr.model_copy(update={"factor": None})
        return self.learning_rate == usual.of(self.facts.conventional_lr_scale)

    @property
    def sweeps(self) -> set[str]:
        """The sweeps that hold its runs, by what stands before their names when there are several."""
        runs: list[ComparedAdapter | Diverged] = [*self.members, *self.diverged]
        return {run.name.rpartition("/")[0] for run in runs}

    @property
    def values(self) -> dict[str, Any]:
        """All that decides its runs but the seeds, flat."""
        return dict(_flat(self.facts.settings))

    @property
    def on_any_data(self) -> str:
        """What it has in common with the arms that differ from it in their rollouts only, as a hash."""
        return arm_of({key: value for key, value in self.facts.identity.items() if key != "rollouts"})

    def name(self, lr: str | None = None) -> str:
        """`dpo-matched`, with its settings where there are others like it."""
        return " ".join(part for part in (f"{self.method}-{lr or self.lr}", self.settings) if part)

    def distance(self, other: Arm) -> int:
        """In how many settings, other than method and rate, it differs from `other`."""
        ours, theirs = self.values, other.values
        keys = {key for key in ours.keys() | theirs.keys() if not key.startswith("method.")} - set(_NOT_SETTINGS)
        return sum(ours.get(key) != theirs.get(key) for key in keys)


def arms_of(cohort: Cohort) -> list[Arm]:
    """The arms of all runs, in the order of the tables."""
    by_configuration: dict[str, Arm] = {}
    for member in cohort.members:
        if member.facts is not None:
            by_configuration.setdefault(member.facts.configuration, Arm(member.facts)).members.append(member)
    for run in cohort.diverged:
        by_configuration.setdefault(run.facts.configuration, Arm(run.facts)).diverged.append(run)
    arms = list(by_configuration.values())
    for arm in arms:
        alike = [other for other in arms if (other.method, other.lr) == (arm.method, arm.lr)]
        arm.settings = _settings(arm, alike)
    for arm in arms:
        arm.learning_rates = [arm.lr, *_other_names(arm, arms)]
    return arms


def arm_names(arms: Sequence[Arm], cohort: Cohort) -> dict[str, str]:
    """For each run's name that of its arm; an adapter made elsewhere is one of its own.

    Raises:
        InputError: Such an adapter is called like an arm, whose runs it would join.
    """
    names = {member.name: member.name for member in cohort.members}
    taken = {arm.name(lr) for arm in arms for lr in arm.learning_rates}
    for member in cohort.members:
        if member.facts is None and member.name in taken:
            raise InputError(f"adapters.{member.name}: a loss of the runs is called so already")
    for arm in arms:
        runs: list[ComparedAdapter | Diverged] = [*arm.members, *arm.diverged]
        names |= {run.name: arm.name() for run in runs}
    return names


def sft_partners(arms: Sequence[Arm], reference: ComparedAdapter) -> dict[str, ComparedAdapter]:
    """For each run's name the SFT run it is held against where a measure is taken of chosen pairs only.

    Of the SFT arm that was trained in all else most as the run's; where several are as near, the one at the reference's
    learning rate.
    """
    found = {}
    candidates = [arm for arm in arms if arm.method == "sft" and arm.members]
    for arm in arms:
        sft = nearest(arm, candidates, reference.facts.learning_rate if reference.facts else None)
        runs: list[ComparedAdapter | Diverged] = [*arm.members, *arm.diverged]
        for run in runs:
            other = partner(run, sft)
            if other:
                found[run.name] = other
    return found


def nearest(arm: Arm, candidates: Iterable[Arm], learning_rate: float | None) -> Arm | None:
    """The candidate that was trained most as `arm` was; of several the first at `learning_rate`."""
    ordered = sorted(candidates, key=lambda other: (arm.distance(other), other.learning_rate != learning_rate))
    return ordered[0] if ordered else None


def repeats(arm: Arm) -> list[Pair]:
    """Pairs of the arm's own runs that started from one initial adapter."""
    return [
        (a.name, b.name)
        for number, a in enumerate(arm.members)
        for b in arm.members[number + 1 :]
        if a.facts and b.facts and a.facts.initial_adapter.sha256 == b.facts.initial_adapter.sha256
    ]


def partner(run: ComparedAdapter | Diverged, arm: Arm | None) -> ComparedAdapter | None:
    """The run of `arm` at the next seed from the same initial adapter; where there is none, that of both its seeds.

    The next, and after the last the first, so that of n seeds each run has one partner whose batches are others.
    """
    if arm is None or run.facts is None:
        return None
    facts = {s.name: s.facts for s in arm.members if s.facts}
    initial, (seed, _) = run.facts.initial_adapter.sha256, run.facts.seeds
    others = [s for s in arm.members if s.name in facts and facts[s.name].initial_adapter.sha256 == initial]
    others = [s for s in others if facts[s.name].seeds[0] != seed]
    if others:
        return min(others, key=lambda s: (facts[s.name].seeds[0] < seed, facts[s.name].seeds[0]))
    return next((s for s in arm.members if s.name in facts and facts[s.name].seeds == run.facts.seeds), None)


def _settings(arm: Arm, alike: Sequence[Arm]) -> str:
    values = [other.values for other in alike]
    keys = sorted({key for each in values for key in each} - set(_NOT_SETTINGS[:-1]))
    differing = [key for key in keys if len({repr(each.get(key)) for each in values}) > 1]
    return " ".join(f"{key}={_shortened(arm.values.get(key))}" for key in differing)


def _shortened(value: Any) -> str:
    """A hash by its first digits."""
    text = str(value)
    return text[:8] if re.fullmatch(r"[0-9a-f]{40,}", text) else text


def _other_names(arm: Arm, arms: Sequence[Arm]) -> list[str]:
    """Names of other `lr` of its sweep that mean this arm's rate for its method: one run is trained for all of them."""
    beside = [other for other in arms if other.base_rate == arm.base_rate and other.sweeps & arm.sweeps]
    taken = {other.lr for other in beside if (other.method, other.settings) == (arm.method, arm.settings)}
    asked = {other.lr: other.facts.config.lr for other in beside}
    scale = arm.facts.conventional_lr_scale
    return sorted(name for name, lr in asked.items() if name not in taken and lr.of(scale) == arm.learning_rate)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
