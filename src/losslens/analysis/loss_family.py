"""The family of losses: factors of their weights, whether updates cluster by them, classes of the first step."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError
from tqdm import tqdm

from losslens.analysis.arms import Arm, repeats
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import ComparedAdapter
from losslens.analysis.manifests import StartedFacts
from losslens.analysis.repeats import CROSS_SEED
from losslens.analysis.snapshots import point_of, trajectory_of
from losslens.core.errors import InputError
from losslens.evaluation.statistics import holm
from losslens.losses import Factors, Loss, builtin_losses
from losslens.losses.presentation import get_presentation
from losslens.measures.clustering import permanova
from losslens.measures.trajectory import trajectory

FACTOR_COLUMNS = ("arm", "method", "unit", "outcome", "gate", "saturation", "length", "stops", "bounded", "first_step")
CLUSTER_COLUMNS = (
    "factor",
    "losses",
    "groups",
    "pseudo_f",
    "explained",
    "expected",
    "p",
    "p_min",
    "p_holm",
    "differ",
    "verdict",
)
CLASS_COLUMNS = ("first_step", "arm", "representative", "step", "seeds", "cosine", "repeats", "repeat")
# What losses may cluster by: the factors of their weights, and two things that differ between losses as well.
CLUSTERED_BY = ("outcome", "gate", "saturation", "length", "unit", "learning_rate")
# Fewest losses that are compared. Whether so many can show something depends on the groups (`p_min`).
_FEWEST = 6
_LEVEL = 0.05
CLUSTERED, NOT_SHOWN = "clustered", "not shown"
# In place of a verdict: no p of groups of these sizes can be small enough; the losses differ in more than their loss.
CANNOT_TELL, SETTINGS_DIFFER = "too few losses to tell", "settings differ"


def factor_table(arms: Sequence[Arm]) -> pd.DataFrame:
    """Builds the table, one row per arm whose loss declares its factors."""
    rows = [{"arm": arm.name(), "method": arm.method, **described} for arm in arms if (described := _described(arm))]
    return pd.DataFrame(rows, columns=list(FACTOR_COLUMNS))


def _described(arm: Arm) -> dict[str, Any] | None:
    """Factors, unit and boundedness of an arm's loss, from its class if it is built in, else from its manifest."""
    loss = loss_of(arm.facts)
    if loss is not None:
        factors = loss.factors
        return None if factors is None else {**asdict(factors), "unit": loss.unit, "bounded": loss.bounded}
    declared = arm.facts.loss.get("factors")
    if not isinstance(declared, dict):
        return None
    texts = {field.name: str(declared.get(field.name, ""))[:100] for field in fields(Factors)}
    return {**texts, "unit": str(arm.facts.loss.get("unit", ""))[:20], "bounded": None}


def loss_of(facts: StartedFacts) -> Loss | None:
    """The built-in loss of a run with its options; None if it is another, or was made with options that are gone."""
    kind = builtin_losses().get(facts.method)
    with contextlib.suppress(ValidationError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is unbounded was said when it was trained
        return kind(name=facts.method, **facts.options) if kind else None
    return None


def cluster_table(arms: Sequence[Arm], factors: pd.DataFrame, arm_pairs: pd.DataFrame) -> pd.DataFrame:
    """Tests for each factor whether the updates of losses that share it lie closer together (`permanova`).

    The losses are arms of equal settings, one per method (`_compared`). The squared distance of two is 1 − cosine, from
    runs at different seeds. Rows of factors by which no two losses differ, or no two agree, are left out. Factors whose
    groups are too small to reach p ≤ .05 are not tested, and do not count in Holm's correction (Tarone 1990).

    Args:
        arms: The arms.
        factors: From `factor_table`.
        arm_pairs: One row for every two arms.

    Returns:
        One row per factor, p corrected by Holm's method over the rows; empty for fewer than six losses. `differ` names
        the setting in which the losses differ beside their loss; there is no verdict then.
    """
    named = {arm.name(): arm for arm in _compared([arm for arm in arms if arm.name() in set(factors["arm"])])}
    about = factors[factors["arm"].isin(named)].set_index("arm")
    about = about.assign(learning_rate=[named[arm].learning_rate for arm in about.index])
    cross = arm_pairs[arm_pairs["pairing"].isin(CROSS_SEED)]
    cosines = {frozenset((row.arm_a, row.arm_b)): row.cosine_relative for row in cross.itertuples()}
    names = list(about.index)

    def unknown(name: str) -> int:
        return sum(not np.isfinite(cosines.get(frozenset((name, other)), np.nan)) for other in names if other != name)

    # Without the losses that lack most: one whose update is 0 has no cosine to any other.
    while names and unknown(worst := max(names, key=unknown)):
        names.remove(worst)
    if len(names) < _FEWEST:
        return pd.DataFrame(columns=list(CLUSTER_COLUMNS))
    distances = np.sqrt([[max(1 - cosines[frozenset((a, b))], 0) if a != b else 0.0 for b in names] for a in names])
    differ = "learning_rate" if about.loc[names, "learning_rate"].nunique() > 1 else ""
    rows = []
    for factor in CLUSTERED_BY:
        groups = about.loc[names, factor].astype(str)
        sizes = groups.value_counts()
        if not 2 <= len(sizes) < len(names):
            continue
        found = permanova(distances, groups.tolist())
        said = "; ".join(f"{group}: {size}" for group, size in sizes.sort_index().items())
        rows.append({"factor": factor, "losses": len(names), "groups": said, **asdict(found), "differ": differ})
    table = pd.DataFrame(rows, columns=[column for column in CLUSTER_COLUMNS if column not in ("p_holm", "verdict")])
    tested = table["p_min"].astype(float) <= _LEVEL
    # The smallest that Holm's correction leaves of them: it is reached if every test of the table is at its smallest.
    possible, found_p = (pd.Series(np.nan, index=table.index) for _ in range(2))
    possible[tested] = holm(table.loc[tested, "p_min"].astype(float).tolist())
    found_p[tested] = holm(table.loc[tested, "p"].astype(float).tolist())
    verdicts = np.select(
        [[bool(differ)] * len(table), ~(possible <= _LEVEL), found_p <= _LEVEL],
        [SETTINGS_DIFFER, CANNOT_TELL, CLUSTERED],
        NOT_SHOWN,
    )
    return table.assign(p_holm=found_p, verdict=verdicts)[list(CLUSTER_COLUMNS)]


def _compared(arms: Sequence[Arm]) -> list[Arm]:
    """Selects the arms whose updates are compared: one per method, with equal settings beside their loss.

    They have one learning rate, or each its conventional one: whichever more methods have, and one rate if as many do.
    Of several arms of a method, the one with the fewest options counts.
    """
    plain = sorted((arm for arm in arms if arm.members), key=lambda arm: len(arm.facts.identity["method"]))
    sets = []
    for first in plain:
        alike = [arm for arm in plain if not arm.distance(first)]
        for group in ([arm for arm in alike if arm.learning_rate == first.learning_rate],
                      [arm for arm in alike if arm.at_conventional_rate]):  # fmt: skip
            by_method = {arm.method: arm for arm in reversed(group)}
            sets.append([arm for arm in arms if by_method.get(arm.method) is arm])

    def preferred(group: list[Arm]) -> tuple[int, bool, int]:
        one_rate = len({arm.learning_rate for arm in group}) == 1
        return len(group), one_rate, sum(arm.at_conventional_rate for arm in group)

    return max(sets, key=preferred, default=[])


def class_table(
    arms: Sequence[Arm], factors: pd.DataFrame, modules: Sequence[str], cache: Cache, left_out: dict[str, str]
) -> pd.DataFrame:
    """Compares losses of one first-step class at the steps of their snapshots.

    A class holds arms that have the same `first_step` and the same learning rate, and differ in their loss only. Each
    is compared with the first of them, its representative, by runs of the same seeds, which meet the same batches.
    Beside it stands the repeat: the representative with itself, by runs of different seeds from one initial adapter.

    Args:
        arms: The arms, with their runs at their ends.
        factors: From `factor_table`.
        modules: Names of the adapted modules.
        cache: Cached results.
        left_out: Receives the runs with a damaged snapshot, with the reason.

    Returns:
        One row per loss (without the representatives) and step.
    """
    rows: list[dict[str, Any]] = []
    for name, members in tqdm(list(_classes(arms, factors)), desc="first-step classes", unit="class", leave=False):
        representative = members[0]
        own = _by_step(repeats(representative), members, modules, cache, left_out)
        for arm in members[1:]:
            of_seeds = {run.facts.seeds: run.name for run in representative.members if run.facts}
            pairs = [
                (run.name, of_seeds[run.facts.seeds])
                for run in arm.members
                if run.facts and run.facts.seeds in of_seeds
            ]
            for step, cosines in sorted(_by_step(pairs, members, modules, cache, left_out).items()):
                repeat = own.get(step, [])
                rows.append(
                    {
                        "first_step": name,
                        "arm": arm.name(),
                        "representative": representative.name(),
                        "step": step,
                        "seeds": len(cosines),
                        "cosine": float(np.mean(cosines)),
                        "repeats": len(repeat),
                        "repeat": float(np.mean(repeat)) if repeat else np.nan,
                    }
                )
    return pd.DataFrame(rows, columns=list(CLASS_COLUMNS))


def _classes(arms: Sequence[Arm], factors: pd.DataFrame) -> Iterator[tuple[str, list[Arm]]]:
    """Yields each class with its arms, in the order of plots; of one method, that with the fewest options first."""
    first_steps = dict(zip(factors["arm"], factors["first_step"], strict=True))
    left = [arm for arm in arms if arm.members and first_steps.get(arm.name())]
    places = {arm.method: get_presentation(arm.method).place for arm in left}
    order = {method: math.inf if place is None else place for method, place in places.items()}
    left.sort(key=lambda arm: (order[arm.method], len(arm.facts.identity["method"])))
    while left:
        first, name = left[0], first_steps[left[0].name()]
        alike = [
            arm
            for arm in left
            if first_steps[arm.name()] == name and arm.learning_rate == first.learning_rate and not arm.distance(first)
        ]
        left = [arm for arm in left if arm not in alike]
        if len(alike) > 1:
            yield name, alike


def _by_step(
    pairs: Sequence[tuple[str, str]],
    arms: Sequence[Arm],
    modules: Sequence[str],
    cache: Cache,
    left_out: dict[str, str],
) -> dict[int, list[float]]:
    """Cosines of pairs of runs at the steps at which both have snapshots; undefined ones are left out."""
    runs = {run.name: run for arm in arms for run in arm.members}
    found: dict[int, list[float]] = {}
    for pair in pairs:
        first, second = (_snapshots(runs[name], left_out) for name in pair)
        for step in first.keys() & second.keys():
            points = [point_of(runs[name], of[step]) for name, of in zip(pair, (first, second), strict=True)]
            key = [[point.key(modules) for point in points]]
            known = cache.load("step", key, ["cosine"])
            if known is None:
                with ExitStack() as stack:
                    a, b = (stack.enter_context(point.open()) for point in points)
                    known = cache.save("step", key, {"cosine": trajectory([a], [b], modules).cosines})
            if np.isfinite(value := float(known["cosine"].item())):
                found.setdefault(step, []).append(value)
    return found


def _snapshots(run: ComparedAdapter, left_out: dict[str, str]) -> dict[int, Any]:
    try:
        snapshots = trajectory_of(run)
    except InputError as error:
        left_out[f"trajectory of {run.name}"] = str(error)
        return {}
    return snapshots if len(snapshots) > 1 else {}
