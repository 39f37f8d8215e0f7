"""Which pairs of runs get the measures that cost forward passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from losslens.analysis.cohort import ComparedAdapter
from losslens.core.errors import InputError

# Up to so many runs all pairs are measured unless the configuration says otherwise.
_ALL_UP_TO = 8

Pair = tuple[str, str]
Choice = Literal["all", "reference", "none"] | list[list[str]] | None


@dataclass(frozen=True)
class Chosen:
    """The pairs that were chosen.

    Attributes:
        pairs: In the order of the tables.
        left_out: What was not chosen and why, in one line; empty when nothing was left out.
    """

    pairs: list[Pair]
    left_out: str


def all_pairs(names: Sequence[str]) -> list[Pair]:
    """Every pair, in the order of the tables."""
    return list(combinations(names, 2))


def choose(
    names: Sequence[str],
    choice: Choice,
    reference: str,
    partners: Mapping[str, str] | None = None,
    repeats: Sequence[Pair] = (),
) -> Chosen:
    """The pairs of `names` that `choice` means; see `conf/analyze.yaml`.

    Args:
        names: The runs.
        choice: What the configuration says.
        reference: The run that the others are held against,
        partners: and for some of them another one, by their seeds.
        repeats: Pairs of one loss at other seeds, by which the others are judged.

    Raises:
        InputError: A name in the list means no run, or several.
    """
    every = all_pairs(names)
    if not every:
        return Chosen([], "one run is no pair")
    partner = {name: other for name, other in (partners or {}).items() if name != other}
    against = {frozenset((name, partner.get(name, reference))) for name in names if name != reference}
    against |= {frozenset(pair) for pair in repeats}
    with_reference = [pair for pair in every if frozenset(pair) in against]
    held = (
        "each run against SFT, of another seed where there is one" if partners else f"only the pairs with {reference}"
    )
    held += ", and the repeats of each loss" * bool(repeats)
    if choice == "all" or (choice is None and len(names) <= _ALL_UP_TO):
        return Chosen(every, "")
    if choice is None:
        why = f"{len(names)} runs, so {held} (pairs=all measures all {len(every)})"
        return Chosen(with_reference, why)
    if choice == "reference":
        return Chosen(with_reference, f"pairs=reference: {held}")
    if choice == "none":
        return Chosen([], "pairs=none")
    wanted = {frozenset(find("pairs", name, names) for name in pair) for pair in choice}
    for pair in wanted:
        if len(pair) == 1:
            raise InputError(f"pairs: {next(iter(pair))} is paired with itself")
    return Chosen([pair for pair in every if frozenset(pair) in wanted], "pairs: only the pairs that are listed")


def extended(chosen: Chosen, names: Sequence[str], before: Sequence[Pair]) -> Chosen:
    """The chosen pairs, and those of `before`, which were measured already.

    Args:
        chosen: What is asked for.
        names: The runs.
        before: Pairs of them, in any order.
    """
    wanted = {frozenset(pair) for pair in [*chosen.pairs, *before]}
    every = all_pairs(names)
    pairs = [pair for pair in every if frozenset(pair) in wanted]
    if len(pairs) == len(chosen.pairs):
        return chosen
    return Chosen(pairs, "" if len(pairs) == len(every) else f"{chosen.left_out}; and the pairs measured before")


def find(field: str, name: str, names: Sequence[str]) -> str:
    """The one of `names` that is `name`, or begins with it.

    Raises:
        InputError: None does, or several do.
    """
    found = (
        [name]
        if name in names
        else [full for full in names if full.startswith(name) or full.rpartition("/")[2].startswith(name)]
    )
    if len(found) != 1:
        what = f"may be {', '.join(found)}" if found else f"is none of {', '.join(names)}"
        raise InputError(f"{field}: {name} {what}")
    return found[0]


def default_reference(members: Sequence[ComparedAdapter]) -> str:
    """The SFT run (where there is none: the run) whose seeds most other runs have; the first of several."""
    facts = {member.name: member.facts for member in members if member.facts}
    if not facts:
        return members[0].name
    seeds = Counter(run.seeds for run in facts.values())
    return max(facts, key=lambda name: (facts[name].method == "sft", seeds[facts[name].seeds]))
