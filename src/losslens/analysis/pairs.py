"""Chooses the pairs of runs for measures that need forward passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from losslens.analysis.cohort import ComparedAdapter
from losslens.core.errors import InputError

# Up to this many runs, all pairs are measured by default.
_ALL_UP_TO = 8

Pair = tuple[str, str]
Choice = Literal["all", "reference", "none"] | list[list[str]] | None


@dataclass(frozen=True)
class SelectedPairs:
    """The chosen pairs.

    Attributes:
        pairs: The pairs, in the order of the tables.
        left_out: What was left out and why, in one line; empty if nothing was.
    """

    pairs: list[Pair]
    left_out: str


def all_pairs(names: Sequence[str]) -> list[Pair]:
    """Returns all pairs, in the order of the tables."""
    return list(combinations(names, 2))


def choose(
    names: Sequence[str],
    choice: Choice,
    reference: str,
    partners: Mapping[str, str] | None = None,
    repeats: Sequence[Pair] = (),
) -> SelectedPairs:
    """Chooses pairs of `names` by the option `pairs`; see `conf/analyze.yaml`.

    Args:
        names: Names of the runs.
        choice: The value of the option.
        reference: The run that the others are compared with by default.
        partners: Runs that replace the reference for some of the others, matched by seeds.
        repeats: Pairs of runs of the same loss at different seeds, from which ceilings are made.

    Raises:
        InputError: A name in the list matches no run or several.
    """
    every = all_pairs(names)
    if not every:
        return SelectedPairs([], "there is only one run")
    partner = {name: other for name, other in (partners or {}).items() if name != other}
    against = {frozenset((name, partner.get(name, reference))) for name in names if name != reference}
    against |= {frozenset(pair) for pair in repeats}
    with_reference = [pair for pair in every if frozenset(pair) in against]
    which = (
        "only each run with SFT, at another seed if there is one" if partners else f"only the pairs with {reference}"
    )
    which += ", and the repeats of each loss" * bool(repeats)
    if choice == "all" or (choice is None and len(names) <= _ALL_UP_TO):
        return SelectedPairs(every, "")
    if choice is None:
        why = f"{len(names)} runs, so {which} (pairs=all measures all {len(every)})"
        return SelectedPairs(with_reference, why)
    if choice == "reference":
        return SelectedPairs(with_reference, f"pairs=reference: {which}")
    if choice == "none":
        return SelectedPairs([], "pairs=none")
    wanted = {frozenset(find("pairs", name, names) for name in pair) for pair in choice}
    for pair in wanted:
        if len(pair) == 1:
            raise InputError(f"pairs: {next(iter(pair))} is paired with itself")
    return SelectedPairs([pair for pair in every if frozenset(pair) in wanted], "pairs: only the listed pairs")


def extended(chosen: SelectedPairs, names: Sequence[str], before: Sequence[Pair]) -> SelectedPairs:
    """Adds the pairs of an earlier analysis to the chosen ones.

    Args:
        chosen: The chosen pairs.
        names: Names of the runs.
        before: Pairs measured earlier, in any order.
    """
    wanted = {frozenset(pair) for pair in [*chosen.pairs, *before]}
    every = all_pairs(names)
    pairs = [pair for pair in every if frozenset(pair) in wanted]
    if len(pairs) == len(chosen.pairs):
        return chosen
    return SelectedPairs(pairs, "" if len(pairs) == len(every) else f"{chosen.left_out}, and the pairs measured before")


def find(field: str, name: str, names: Sequence[str]) -> str:
    """Finds the one of `names` that equals `name` or begins with it.

    Raises:
        InputError: No name or several names match.
    """
    matches = (
        [name]
        if name in names
        else [full for full in names if full.startswith(name) or full.rpartition("/")[2].startswith(name)]
    )
    if len(matches) != 1:
        what = f"is ambiguous: {', '.join(matches)}" if matches else f"matches none of {', '.join(names)}"
        raise InputError(f"{field}: {name} {what}")
    return matches[0]


def default_reference(members: Sequence[ComparedAdapter]) -> str:
    """Returns the SFT run (or any run, without SFT) whose seeds most runs have; the first of several."""
    facts = {member.name: member.facts for member in members if member.facts}
    if not facts:
        return members[0].name
    seeds = Counter(run.seeds for run in facts.values())
    return max(facts, key=lambda name: (facts[name].method == "sft", seeds[facts[name].seeds]))
