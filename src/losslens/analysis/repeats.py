"""Compares two losses by their runs, with repeats, ceilings, repeat levels and verdicts.

Model behind every formula: the update of a run is the mean update of its loss plus noise of mean 0, independent across
seeds. Only pairs of runs with different seeds count, since two runs of one seed share their batches and thus their
noise, and read too high. For such pairs E cos(a, b) = cos of the two mean updates · √(ρ_a·ρ_b), where ρ is the cosine
of a loss with itself at another seed (Spearman 1904); variances of distances add, so two copies of one loss are
½(d_aa' + d_bb') apart. Only this module combines pairs of runs into numbers of two arms.
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
# Kind of repeat by pairing: what changed between two runs of one loss.
REPEAT_KINDS = {SAME_INIT: "order", SAME_ORDER: "start", OTHER: "order and start"}
# Two arms are compared by the first pairing they have: different seeds before pairs that share batches.
_ORDER = (SAME_INIT, OTHER, SAME_SEEDS, SAME_ORDER, "")
# Pairings with independent noise.
CROSS_SEED = (SAME_INIT, OTHER)

_MEASURES = pair_measures()
MEASURES = tuple(measure.name for measure in _MEASURES)
_BY_NAME = {measure.name: measure for measure in _MEASURES}
_COSINE = MEASURES.index("cosine")
# Smallest ρ for a ratio; below it the noise of a loss is too large.
LEAST_RELIABILITY = 0.2
# Largest width of an interval containing 1 for the verdict "one loss".
_NARROW = 0.2

ONE_LOSS, RELATED, NOTHING, OPPOSED = "one loss", "related", "nothing in common", "opposed"
TOO_NOISY, TOO_FEW = "too noisy to say", "too few seeds"

COLUMNS = (
    "arm_a", "arm_b", "pairing", "pairs", "repeats", "repeat_kind", "cosine_repeat_a", "cosine_repeat_b",
    *(f"{measure.name}{end}" for measure in _MEASURES for end in measure.endings),
)  # fmt: skip


def pairing(
    seeds: tuple[int, int | None] | None,
    others: tuple[int, int | None] | None,
    same_init: bool | None,
    own: tuple[bool, bool] = (False, False),
) -> str:
    """Returns what two runs share: `same seeds`, `same init`, `same order` or `other`; empty if unknown.

    With one seed two runs share their batches, unless one of them samples its own. Two that do share their prompts and
    the random numbers of their samples.

    Args:
        seeds: `seed` and `init_seed` of the first run.
        others: `seed` and `init_seed` of the second run.
        same_init: True if both started from the same A, or both from the base itself.
        own: Whether each of them trained on samples of its own policy.
    """
    if seeds is None or others is None or same_init is None:
        return ""
    if seeds[0] == others[0] and own[0] == own[1]:
        return SAME_SEEDS if same_init else SAME_ORDER
    return SAME_INIT if same_init else OTHER


def _are(measures: Sequence[str], kind: Kind) -> NDArray[np.bool_]:
    return np.array([_BY_NAME[measure].kind == kind for measure in measures])


def _level_name(measure: str) -> str:
    """Returns the column of a measure's ceiling or repeat level: `cosine_ceiling`, `barrier_chord_repeat`."""
    return f"{measure}_{_BY_NAME[measure].level}"


def is_reliable(own: Array, null: Array) -> NDArray[np.bool_]:
    """True where a loss is reliable: ρ is at least .2 and, if known, above its null."""
    with np.errstate(invalid="ignore"):
        return (own >= LEAST_RELIABILITY) & ~(own <= null)


def level(measures: Sequence[str], own_a: Array, own_b: Array, nulls_a: Array, nulls_b: Array) -> Array:
    """Computes ceilings √(ρρ') (similarities) and repeat levels ½(d + d') (others); shape as `own_a`.

    NaN if a loss has no repeat, and for similarities if one is not reliable, so a ceiling is never 0.

    Args:
        measures: Names of the measures, along the last axis.
        own_a: Repeats of the first loss, shape (…, measures).
        own_b: Repeats of the second loss, same shape.
        nulls_a: Nulls of `own_a`; NaN if there is none.
        nulls_b: Nulls of `own_b`.
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
    """Returns the verdict on the cosine of two losses; `too few seeds` if none can be given, empty without a cosine.

    Args:
        value: The cosine over cross-seed pairs.
        null: Its null.
        own: ρ of both losses; NaN for a loss without repeats.
        nulls: The null of each ρ.
        interval: 95% interval of the ratio to the ceiling; NaN if there is none.
    """
    low, high = interval
    if np.isnan(value):  # a zero update has no direction
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
        seeds: `seed` (data order) of both runs, that of the first arm first; shape (pairs, 2).
        values: Values of the measures, shape (pairs, measures).
        nulls: Nulls of the measures, NaN for those without; same shape.
    """

    seeds: Array
    values: Array
    nulls: Array

    def mean(self, without: float | None = None) -> Array:
        """Returns the mean of each measure, optionally without the runs of one seed; NaN if no pair is left."""
        return _mean(self.values if without is None else self.values[(self.seeds != without).all(axis=1)])


def arm_pairs(pairs: pd.DataFrame, seeds: Mapping[str, float], arms: Sequence[str]) -> pd.DataFrame:
    """Builds `arm_pairs.csv`: one row for every two arms, and each arm with itself, that have a pair of runs.

    Args:
        pairs: One row per pair of runs, with `run_a`, `run_b`, `arm_a`, `arm_b`, `pairing`, measures and nulls.
        seeds: `seed` (data order) of each run.
        arms: Names of the arms, in the order of the table.

    Returns:
        The `pairing` by which the two are compared and the number of `pairs`; the mean, range and null of each measure
        over them; its ceiling or repeat level; `_relative`, the ratio to the ceiling (for distances the excess over the
        level), with its 95% jackknife interval `_low`, `_high`; `repeats`, the smaller number of seeds of the two;
        `repeat_kind`, what changed between the repeats of both losses; `cosine_repeat_a` and `_b`, the repeats from
        which the ceiling is made; `cosine_verdict`. In the row of an arm with itself the means are its repeats, and
        the relative columns are empty.
    """
    groups = _grouped(pairs, seeds, arms)
    rows = []
    for a, b in combinations_with_replacement(arms, 2):
        kind = next((kind for kind in _ORDER if (a, b, kind) in groups), None)
        if kind is not None:
            between, own = groups[a, b, kind], [groups.get((arm, arm, kind)) for arm in (a, b)]
            if a == b:
                row = _repeat_row(between)
            else:
                row = _comparison_row(between, own if kind in CROSS_SEED else [None, None])
            repeated = all(own) and (a == b or kind in CROSS_SEED)
            changed = REPEAT_KINDS.get(kind, "") if repeated else ""
            rows.append({"arm_a": a, "arm_b": b, "pairing": kind, "repeat_kind": changed, **row})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"pairs": "Int64", "repeats": "Int64"})


def with_levels(table: pd.DataFrame, measures: Sequence[str], by: Sequence[str] = ()) -> pd.DataFrame:
    """Adds ceilings or repeat levels to pairs of runs of two losses at different seeds; other cells are empty.

    Args:
        table: One row per pair (and value of `by`), with `arm_a`, `arm_b`, `pairing`, the measures and their nulls.
        measures: Measures that get a level.
        by: Further columns to group by.
    """
    own = table[(table["arm_a"] == table["arm_b"]) & table["pairing"].isin(CROSS_SEED)]
    nulls = [f"{measure}_null" for measure in measures if f"{measure}_null" in table]
    means = own.groupby(["arm_a", "pairing", *by])[[*measures, *nulls]].mean()
    sides = []
    for arm in ("arm_a", "arm_b"):
        keys = pd.MultiIndex.from_frame(table[[arm, "pairing", *by]])
        side = means.reindex(keys).reindex(columns=[*measures, *(f"{measure}_null" for measure in measures)])
        sides.append(side.to_numpy(dtype=float))
    count = len(measures)
    (own_a, nulls_a), (own_b, nulls_b) = ((side[:, :count], side[:, count:]) for side in sides)
    levels = level(measures, own_a, own_b, nulls_a, nulls_b)
    levels[(table["arm_a"] == table["arm_b"]).to_numpy()] = np.nan
    return table.assign(**{_level_name(measure): levels[:, place] for place, measure in enumerate(measures)})


def repeat_table(
    pairs: pd.DataFrame, seeds: Mapping[str, float], facts: Mapping[str, Mapping[str, Any]], losses: Mapping[str, str]
) -> pd.DataFrame:
    """Builds `repeats.csv`: one row per arm and kind of repeat, with the mean of each measure over its pairs of runs.

    Args:
        pairs: The pairs, as for `arm_pairs`.
        seeds: The seeds, as for `arm_pairs`.
        facts: Further columns of each arm, in the order of the table.
        losses: For each arm, a key shared by arms that differ only in their rollouts; from the same A these count as
            repeats on other data.
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
    """Returns the smaller number of seeds of the arms in these pairs."""
    sides = pd.concat([pairs[[f"arm_{side}", f"run_{side}"]].set_axis(["arm", "run"], axis=1) for side in "ab"])
    return int(sides["run"].map(seeds).groupby(sides["arm"]).nunique().min())


def _ordered(pairs: pd.DataFrame, arms: Sequence[str]) -> tuple[pd.Series, pd.Series, NDArray[np.bool_]]:
    """Returns both arms of each pair in the order of `arms`, and a mask of the pairs that were swapped."""
    place = {arm: number for number, arm in enumerate(arms)}
    turned = (pairs["arm_a"].map(place) > pairs["arm_b"].map(place)).to_numpy()
    first, second = pairs["arm_b"].where(turned, pairs["arm_a"]), pairs["arm_a"].where(turned, pairs["arm_b"])
    return first.rename("first"), second.rename("second"), turned


def _grouped(
    pairs: pd.DataFrame, seeds: Mapping[str, float], arms: Sequence[str]
) -> dict[tuple[str, str, str], _Pairs]:
    """Groups the pairs by their two arms, in the order of `arms`, and by pairing."""
    first, second, turned = _ordered(pairs, arms)
    of_runs = np.stack([pairs[run].map(seeds).to_numpy(dtype=float) for run in ("run_a", "run_b")], axis=1)
    of_runs[turned] = of_runs[turned, ::-1]
    values = pairs.reindex(columns=MEASURES).to_numpy(dtype=float)
    nulls = pairs.reindex(columns=[f"{measure}_null" for measure in MEASURES]).to_numpy(dtype=float)
    groups = pairs.groupby([first, second, "pairing"]).indices if len(pairs) else {}
    return {key: _Pairs(of_runs[rows], values[rows], nulls[rows]) for key, rows in groups.items()}


def _repeat_row(repeats: _Pairs) -> dict[str, Any]:
    """Returns the row of a loss with itself."""
    return {**_described(repeats), "repeats": len(np.unique(repeats.seeds)), "cosine_verdict": ""}


def _comparison_row(between: _Pairs, own: Sequence[_Pairs | None]) -> dict[str, Any]:
    """Returns the row of two losses; `own` holds the repeats of each, None for a loss without repeats."""
    values, nulls = between.mean(), _mean(between.nulls)
    unknown = np.full(len(MEASURES), np.nan)
    rho = [unknown if repeats is None else repeats.mean() for repeats in own]
    rho_nulls = [unknown if repeats is None else _mean(repeats.nulls) for repeats in own]
    # A loss without repeats counts the seeds of its runs in these pairs.
    fewest = min(
        len(np.unique(between.seeds[:, side] if repeats is None else repeats.seeds)) for side, repeats in enumerate(own)
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
        columns = {"relative": relative, "low": low, "high": high}
        row |= {f"{measure}_{end}": column[place] for end, column in columns.items()}
        row[_level_name(measure)] = levels[place]
    at = _COSINE
    own_cosines, own_nulls = [repeat[at] for repeat in rho], [null[at] for null in rho_nulls]
    verdict = direction(values[at], nulls[at], own_cosines, own_nulls, (low[at], high[at]))
    # There are enough seeds, but leaving one out makes a ρ non-positive.
    lost = verdict == TOO_FEW and fewest > 2 and not np.isnan(relative[at])
    return row | {"cosine_verdict": TOO_NOISY if lost else verdict}


def _described(pairs: _Pairs) -> dict[str, Any]:
    """Returns the number of pairs, and the mean, range and null of each measure over them."""
    with np.errstate(all="ignore"):
        ends = [_extreme(reduce, pairs.values) for reduce in (np.nanmin, np.nanmax)]
    columns = {"": pairs.mean(), "_min": ends[0], "_max": ends[1], "_null": _mean(pairs.nulls)}
    return {"pairs": len(pairs.values)} | {
        f"{measure}{end}": column[place] for place, measure in enumerate(MEASURES) for end, column in columns.items()
    }


def _raw_level(own_a: Array, own_b: Array) -> Array:
    """Computes the level without the reliability rule, which applies to the whole and not to parts of a jackknife.

    NaN for similarities if a repeat is not above 0, since two negative ones must not make a ceiling.
    """
    above = np.where((own_a > 0) & (own_b > 0), own_a * own_b, np.nan)
    return np.where(_are(MEASURES, "similarity"), np.sqrt(above), (own_a + own_b) / 2)


def _relative(values: Array, levels: Array) -> Array:
    """Computes the ratio of similarities to their ceiling and the excess of distances over their level; else NaN."""
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
    extremes = np.full(len(MEASURES), np.nan)
    known = ~np.isnan(values).all(axis=0)
    extremes[known] = reduce(values[:, known], axis=0)
    return extremes
