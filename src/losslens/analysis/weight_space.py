"""Weight-space geometry of runs and pairs, cached by run and by pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any

from tqdm import tqdm

from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort, ComparedAdapter
from losslens.analysis.pairs import Pair, all_pairs
from losslens.measures.comparison import PairGeometry, RunGeometry, compare
from losslens.updates.base import pairs_of
from losslens.updates.folder import open_adapter


def measure_weight_space(
    cohort: Cohort, top: int, cache: Cache
) -> tuple[dict[str, RunGeometry], dict[Pair, PairGeometry]]:
    """Measures every run and every pair of runs, except for those in the cache."""
    names, by_name, modules = cohort.names, cohort.by_name, cohort.modules
    runs, pairs = {}, {}
    for name in names:
        if (known := cache.load("run", initial_key(by_name[name], modules), _names_of(RunGeometry))) is not None:
            runs[name] = RunGeometry(**known)
    for a, b in all_pairs(names):
        key = _pair_key(by_name[a], by_name[b], top, modules)
        if (known := cache.load("pair", key, _names_of(PairGeometry))) is not None:
            pairs[a, b] = PairGeometry(**known)
    fresh = _fresh(names, set(runs), set(pairs))
    if fresh:
        ordered = [*fresh, *(name for name in names if name not in fresh)]
        new_runs, new_pairs = _compare([by_name[name] for name in ordered], len(fresh), modules, top)
        for name, run in zip(fresh, new_runs, strict=True):
            runs[name] = RunGeometry(**cache.save("run", initial_key(by_name[name], modules), vars(run)))
        order = {name: number for number, name in enumerate(names)}
        for (i, j), pair in zip(pairs_of(len(ordered), len(fresh)), new_pairs.values(), strict=True):
            a, b = sorted((ordered[i], ordered[j]), key=order.__getitem__)
            key = _pair_key(by_name[a], by_name[b], top, modules)
            pairs[a, b] = PairGeometry(**cache.save("pair", key, vars(pair)))
    return {name: runs[name] for name in names}, {pair: pairs[pair] for pair in all_pairs(names)}


def _fresh(names: Sequence[str], runs: set[str], pairs: set[Pair]) -> list[str]:
    """Returns a small set of runs that covers every run and pair missing from the cache (greedy cover)."""
    fresh = [name for name in names if name not in runs]
    missing = {pair for pair in all_pairs(names) if pair not in pairs and not set(pair) & set(fresh)}
    while missing:
        [(name, _)] = Counter(name for pair in missing for name in pair).most_common(1)
        fresh.append(name)
        missing = {pair for pair in missing if name not in pair}
    return fresh


def _compare(
    members: Sequence[ComparedAdapter], fresh: int, modules: list[str], top: int
) -> tuple[list[RunGeometry], dict[tuple[int, int], PairGeometry]]:
    with ExitStack() as stack:
        adapters = [stack.enter_context(member.point.open()) for member in members]
        folders = {member.initial for member in members[:fresh] if member.initial}
        starts = {folder: stack.enter_context(open_adapter(folder)) for folder in folders}
        initial = [starts[member.initial] if member.initial else None for member in members[:fresh]]

        def progress(steps: Any) -> Any:
            return tqdm(steps, desc="geometry", unit="module", total=len(modules), leave=False, dynamic_ncols=True)

        return compare(adapters, modules, top=top, fresh=fresh, initial=initial, progress=progress)


def initial_key(member: ComparedAdapter, modules: Sequence[str]) -> list[Any]:
    """Returns a cache key of an update on some modules, and of the adapter that it started from."""
    return [member.point.key(modules), member.facts.start if member.facts and member.initial else None]


def _names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _pair_key(first: ComparedAdapter, second: ComparedAdapter, top: int, modules: Sequence[str]) -> list[Any]:
    # Version 2: runs of unequal ranks are compared in as many directions as the smaller rank.
    return [*_in_order((first.point.key(modules), second.point.key(modules))), top, 2]


def _in_order(keys: Sequence[Any]) -> list[Any]:
    return sorted(keys, key=str)
