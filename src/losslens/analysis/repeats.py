"""Two losses against each other, each loss against itself, and what the one says of the other.

The model behind every formula: the update of a run is its loss's mean update and noise of mean 0, independent across
seeds. So only pairs of runs with different seeds count: two runs of one seed met the same batches, share their noise,
and read too high. Of such pairs E cos(a, b) = cos of the two mean updates · √(ρ_a·ρ_b), ρ being what a loss has with
itself at another seed (Spearman 1904); variances of distances add, so two copies of one loss are ½(d_aa' + d_bb')
apart. Nothing outside this module makes a number of two arms out of pairs of runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.evaluation.statistics import jackknife_interval
from losslens.measures import Kind, pair_measures

Array = NDArray[np.float64]

SAME_SEEDS, SAME_INIT, SAME_ORDER, OTHER = "same seeds", "same init", "same order", "other"
# What changed between two runs of one loss.
REPEAT_KINDS = {SAME_INIT: "order", SAME_ORDER: "start", OTHER: "order and start"}
# Two arms are compared by the first kind of pairs that they have: those of other seeds before those that share batches.
_ORDER = (SAME_INIT, OTHER, SAME_SEEDS, SAME_ORDER, "")
# Pairs whose noise is independent.
CROSS_SEED = (SAME_INIT, OTHER)

_MEASURES = pair_measures()
MEASURES = tuple(measure.name for measure in _MEASURES)
_BY_NAME = {measure.name: measure for measure in _MEASURES}
_COSINE = MEASURES.index("cosine")
# A loss that is less like itself than this has too much noise for a ratio.
LEAST_RELIABILITY = 0.2
# An interval that holds 1 says "one loss" only where it is narrower.
_NARROW = 0.2

ONE_LOSS, RELATED, NOTHING, OPPOSED = "one loss", "related", "nothing in common", "opposed"
TOO_NOISY, TOO_FEW = "too noisy to say", "too few seeds"

COLUMNS = (
    "arm_a", "arm_b", "pairing", "pairs", "repeats", "repeat_kind", "cosine_repeat_a", "cosine_repeat_b",
    *(f"{measure.name}{end}" for measure in _MEASURES for end in measure.endings),
)  # fmt: skip


def pairing(seeds: tuple[int, int] | None, others: tuple[int, int] | None, same_init: bool | None) -> str:
    """What two runs share: `same seeds`, `same init`, `same order` or `other`; empty where that is not known.

    Args:
        seeds: `seed` and `init_seed` of the one.
        others: Those of the other.
        same_init: Whether both started from the same A.
    """
    if seeds is None or others is None or same_init is None:
        return ""
    if seeds[0] == others[0]:
        return SAME_SEEDS if same_init else SAME_ORDER
    return SAME_INIT if same_init else OTHER


def _are(measures: Sequence[str], kind: Kind) -> NDArray[np.bool_]:
    return np.array([_BY_NAME[measure].kind == kind for measure in measures])


def _level_name(measure: str) -> str:
    """`cosine_ceiling`, `barrier_chord_repeat`: the column of what two copies of one loss would show."""
    return f"{measure}_{_BY_NAME[measure].level}"


def is_reliable(own: Array, null: Array) -> NDArray[np.bool_]:
    """Whether a loss is like itself: ρ at least .2, and above its null where that is known."""
    with np.errstate(invalid="ignore"):
        return (own >= LEAST_RELIABILITY) & ~(own <= null)


def level(measures: Sequence[str], own_a: Array, own_b: Array, nulls_a: Array, nulls_b: Array) -> Array:
    """What two losses would show that are one: √(ρρ') for similarities, ½(d + d') for the rest; shape as `own_a`.

    NaN where one of them was not repeated, and for similarities where one is not reliable: never a ceiling of 0.

    Args:
        measures: Names, along the last axis.
        own_a: What one loss shows with itself, shape (…, measures).
        own_b: What the other shows.
        nulls_a: The bound that `own_a` stays below by chance; NaN where there is none.
        nulls_b: That of `own_b`.
    """
    similar = _are(measures, "similarity")
    usable = is_reliable(own_a, nulls_a) & is_reliable(own_b, nulls_b)
    ceiling = np.sqrt(np.where(usable & similar, own_a * own_b, np.nan))
    levels = np.where(similar, ceiling, (own_a + own_b) / 2)
    for place, measure in enumerate(measures):
        if (derived := _BY_NAME[measure].derived) is not None:
            levels[..., place] = derived(levels[..., list(measures).index("cosine")])
    return levels


def direction(
    value: float, null: float, own: Sequence[float], nulls: Sequence[float], interval: Sequence[float]
) -> str:
    """What the cosine of two losses says: one of five verdicts, or `too few seeds` where none can be given.

    Args:
        value: Their cosine over cross-seed pairs.
        null: The bound that it stays below by chance.
        own: ρ of both, NaN where a loss was not repeated.
        nulls: The null of each ρ.
        interval: 95% of the ratio to the ceiling, NaN where there is none.
    """
    low, high = interval
    if np.isnan(value):  # an update of 0 has no direction
        return ""
    if np.isnan(own).any():
        return TOO_FEW
    if not is_reliable(np.array(own), np.array(nulls)).all():
        return TOO_NOISY
    if abs(value) <= null:
        return NOTHING
    if np.isnan(low):
        return TOO_FEW
    if high < 0:
        return OPPOSED
    if low <= 0:
        return TOO_NOISY
    return ONE_LOSS if low <= 1 <= high and high - low < _NARROW else RELATED


@dataclass(frozen=True)
class _Pairs:
    """Pairs of runs.

    Attributes:
        seeds: The seed of the data's order of both runs, that of the first arm first; shape (pairs, 2).
        values: Of each measure, shape (pairs, measures).
        nulls: Of each measure, NaN where it has none; the same shape.
    """

    seeds: Array
    values: Array
    nulls: Array

    def mean(self, without: float | None = None) -> Array:
        """The mean of each measure, without the runs of one seed; NaN where nothing is left."""
        return _mean(self.values if without is None else self.values[(self.seeds != without).all(axis=1)])


def arm_pairs(pairs: pd.DataFrame, seeds: Mapping[str, float], arms: Sequence[str]) -> pd.DataFrame:
    """One row for every two arms, and for each arm and itself, that have a pair of runs.

    Args:
        pairs: One row a pair of runs, with `run_a`, `run_b`, `arm_a`, `arm_b`, `pairing`, the measures and their nulls.
        seeds: The seed of the data's order of each run.
        arms: In the order of the table.

    Returns:
        `pairing`, by which the two are compared, and how many `pairs` that are; each measure's mean, range and null
        over them; its ceiling or repeat level; `_relative`, the ratio to the ceiling (of distances the excess over the
        level), with its 95% jackknife interval `_low`, `_high`; `repeats`, how many seeds each loss has at least;
        `repeat_kind`, what changed between two runs of one loss, where both were repeated so; `cosine_repeat_a` and
        `_b`, what each has with itself, of which the ceiling is made; `cosine_verdict`. In the row of an arm and itself
        the means are its repeats, and nothing is relative to anything.
    """
    groups = _grouped(pairs, seeds, arms)
    rows = []
    for a, b in combinations_with_replacement(arms, 2):
        kind = next((kind for kind in _ORDER if (a, b, kind) in groups), None)
        if kind is not None:
            between, own = groups[a, b, kind], [groups.get((arm, arm, kind)) for arm in (a, b)]
            found = _with_itself(between) if a == b else _compared(between, own if kind in CROSS_SEED else [None, None])
            repeated = all(own) and (a == b or kind in CROSS_SEED)
            changed = REPEAT_KINDS.get(kind, "") if repeated else ""
            rows.append({"arm_a": a, "arm_b": b, "pairing": kind, "repeat_kind": changed, **found})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"pairs": "Int64", "repeats": "Int64"})


def with_levels(table: pd.DataFrame, measures: Sequence[str], by: Sequence[str] = ()) -> pd.DataFrame:
    """`table` with the ceiling or repeat level of each pair of runs of two losses at different seeds; else empty.

    Args:
        table: One row a pair (and value of `by`), with `arm_a`, `arm_b`, `pairing`, the measures and their nulls.
        measures: Those that get a level.
        by: Further columns, whose values are kept apart.
    """
    own = table[(table["arm_a"] == table["arm_b"]) & table["pairing"].isin(CROSS_SEED)]
    nulls = [f"{measure}_null" for measure in measures if f"{measure}_null" in table]
    means = own.groupby(["arm_a", "pairing", *by])[[*measures, *nulls]].mean()
    sides = []
    for arm in ("arm_a", "arm_b"):
        keys = pd.MultiIndex.from_frame(table[[arm, "pairing", *by]])
        found = means.reindex(keys).reindex(columns=[*measures, *(f"{measure}_null" for measure in measures)])
        sides.append(found.to_numpy(dtype=float))
    count = len(measures)
    (own_a, nulls_a), (own_b, nulls_b) = ((side[:, :count], side[:, count:]) for side in sides)
    levels = level(measures, own_a, own_b, nulls_a, nulls_b)
    levels[(table["arm_a"] == table["arm_b"]).to_numpy()] = np.nan
    return table.assign(**{_level_name(measure): levels[:, place] for place, measure in enumerate(measures)})


def repeat_table(
    pairs: pd.DataFrame, seeds: Mapping[str, float], facts: Mapping[str, Mapping[str, Any]], losses: Mapping[str, str]
) -> pd.DataFrame:
    """One row an arm and kind of repeat: the mean of each measure over the pairs of runs of one loss.

    Args:
        pairs: As `arm_pairs` takes them.
        seeds: As well.
        facts: What else to say of each arm, in the order of the table.
        losses: What each arm has in common with those that differ from it in their rollouts only, which are its repeats
            on other data, from the same A.
    """
    first, second, _ = _ordered(pairs, list(facts))
    kinds = pairs["pairing"].map(REPEAT_KINDS).where(first == second)
    data = (first.map(losses) == second.map(losses)) & (first != second) & first.isin(losses)
    kinds = kinds.mask(data & pairs["pairing"].isin([SAME_SEEDS, SAME_INIT]), "data")
    rows = [
        {
            "arm": arm, "again": other, **facts[arm], "repeat_kind": kind, "pairs": len(group),
            "repeats": _seeds_of(group, seeds), **group[list(MEASURES)].mean(),
        }
        for (arm, other, kind), group in pairs.groupby([first, second, kinds.rename("kind")], sort=False)
    ]  # fmt: skip
    names = dict.fromkeys(name for values in facts.values() for name in values)
    return pd.DataFrame(rows, columns=["arm", "again", *names, "repeat_kind", "pairs", "repeats", *MEASURES])


def _seeds_of(pairs: pd.DataFrame, seeds: Mapping[str, float]) -> int:
    """How many seeds each arm has at least in pairs of two arms, or of one."""
    sides = pd.concat([pairs[[f"arm_{side}", f"run_{side}"]].set_axis(["arm", "run"], axis=1) for side in "ab"])
    return int(sides["run"].map(seeds).groupby(sides["arm"]).nunique().min())


def _ordered(pairs: pd.DataFrame, arms: Sequence[str]) -> tuple[pd.Series, pd.Series, NDArray[np.bool_]]:
    """Both arms of each pair, the one first that is first in `arms`, and where they were turned for that."""
    place = {arm: number for number, arm in enumerate(arms)}
    turned = (pairs["arm_a"].map(place) > pairs["arm_b"].map(place)).to_numpy()
    first, second = pairs["arm_b"].where(turned, pairs["arm_a"]), pairs["arm_a"].where(turned, pairs["arm_b"])
    return first.rename("first"), second.rename("second"), turned


def _grouped(
    pairs: pd.DataFrame, seeds: Mapping[str, float], arms: Sequence[str]
) -> dict[tuple[str, str, str], _Pairs]:
    """The pairs of every two arms, the one first that is first in `arms`, by their pairing."""
    first, second, turned = _ordered(pairs, arms)
    of_runs = np.stack([pairs[run].map(seeds).to_numpy(dtype=float) for run in ("run_a", "run_b")], axis=1)
    of_runs[turned] = of_runs[turned, ::-1]
    values = pairs.reindex(columns=MEASURES).to_numpy(dtype=float)
    nulls = pairs.reindex(columns=[f"{measure}_null" for measure in MEASURES]).to_numpy(dtype=float)
    found = pairs.groupby([first, second, "pairing"]).indices if len(pairs) else {}
    return {key: _Pairs(of_runs[rows], values[rows], nulls[rows]) for key, rows in found.items()}


def _with_itself(repeats: _Pairs) -> dict[str, Any]:
    """The row of a loss and itself."""
    return {**_described(repeats), "repeats": len(np.unique(repeats.seeds)), "cosine_verdict": ""}


def _compared(between: _Pairs, own: Sequence[_Pairs | None]) -> dict[str, Any]:
    """The row of two losses, `own` being what each has with itself, None where it was not repeated."""
    values, nulls = between.mean(), _mean(between.nulls)
    unknown = np.full(len(MEASURES), np.nan)
    rho = [unknown if each is None else each.mean() for each in own]
    rho_nulls = [unknown if each is None else _mean(each.nulls) for each in own]
    # Of a loss without repeats the runs that it has in these pairs.
    fewest = min(
        len(np.unique(between.seeds[:, side] if each is None else each.seeds)) for side, each in enumerate(own)
    )
    levels = level(MEASURES, *rho, *rho_nulls)
    relative = _relative(values, levels)
    low, high = unknown, unknown
    a, b = own
    if a is not None and b is not None:
        seeds = np.unique(np.concatenate([between.seeds, a.seeds, b.seeds]))
        without = [_relative(between.mean(seed), _raw_level(a.mean(seed), b.mean(seed))) for seed in seeds]
        low, high = jackknife_interval(relative, np.array(without), fewest)
    row = {**_described(between), "repeats": fewest, "cosine_repeat_a": rho[0][_COSINE]}
    row |= {"cosine_repeat_b": rho[1][_COSINE]}
    for place, measure in enumerate(MEASURES):
        found = {"relative": relative, "low": low, "high": high}
        row |= {f"{measure}_{end}": values_of[place] for end, values_of in found.items()}
        row[_level_name(measure)] = levels[place]
    at = _COSINE
    own_cosines, own_nulls = [each[at] for each in rho], [each[at] for each in rho_nulls]
    verdict = direction(values[at], nulls[at], own_cosines, own_nulls, (low[at], high[at]))
    # Seeds there are enough, but without one of them a loss has nothing of itself.
    lost = verdict == TOO_FEW and fewest > 2 and not np.isnan(relative[at])
    return row | {"cosine_verdict": TOO_NOISY if lost else verdict}


def _described(pairs: _Pairs) -> dict[str, Any]:
    """How many pairs, and the mean, range and null of each measure over them."""
    with np.errstate(all="ignore"):
        ends = [_extreme(reduce, pairs.values) for reduce in (np.nanmin, np.nanmax)]
    columns = {"": pairs.mean(), "_min": ends[0], "_max": ends[1], "_null": _mean(pairs.nulls)}
    return {"pairs": len(pairs.values)} | {
        f"{measure}{end}": found[place] for place, measure in enumerate(MEASURES) for end, found in columns.items()
    }


def _raw_level(own_a: Array, own_b: Array) -> Array:
    """The level without the rule of reliability, which is one for the whole, not for the parts of a jackknife.

    Of similarities NaN where one of the two is not above 0: two such ones make no ceiling.
    """
    above = np.where((own_a > 0) & (own_b > 0), own_a * own_b, np.nan)
    return np.where(_are(MEASURES, "similarity"), np.sqrt(above), (own_a + own_b) / 2)


def _relative(values: Array, levels: Array) -> Array:
    """The ratio of similarities to their ceiling, the excess of distances over their level; of angles nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(_are(MEASURES, "similarity"), values / levels, np.nan)
    return np.where(_are(MEASURES, "distance"), values - levels, ratio)


def _mean(values: Array) -> Array:
    known = ~np.isnan(values)
    counts = known.sum(axis=0)
    sums = np.where(known, values, 0.0).sum(axis=0)
    means: Array = np.divide(sums, counts, out=np.full(len(MEASURES), np.nan), where=counts > 0)
    return means


def _extreme(reduce: Any, values: Array) -> Array:
    found = np.full(len(MEASURES), np.nan)
    known = ~np.isnan(values).all(axis=0)
    found[known] = reduce(values[:, known], axis=0)
    return found
