"""The comparison of losses, each at its own best learning rate, beside the conventional and the matched rates.

There are two rules. *Equal steps*: runs are compared at their ends. *Equal norm*: each run at the first point of its
trajectory that reaches one ‖ΔW‖, the largest that every loss reaches at half at least of its rates that can be chosen.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count, islice
from typing import Any

import pandas as pd

from losslens.analysis.accuracy import by_problem
from losslens.analysis.arm_accuracy import BASE, compare_arms, outcomes_of
from losslens.analysis.arms import Arm
from losslens.analysis.cohort import Cohort, ComparedAdapter
from losslens.analysis.rate_choice import (
    NORM,
    SAME_RUNS,
    Outcomes,
    TunedLoss,
    common_norm,
    losses_of,
    rate_rows,
    with_unfinished,
)
from losslens.analysis.scores import scores_of_runs
from losslens.analysis.snapshots import at_checkpoint
from losslens.config.identity import in_current_words
from losslens.core.errors import InputError
from losslens.core.mappings import flatten
from losslens.losses import Method, builtin_methods

# Sets of rates at which the losses are compared with each other.
TUNED, TUNED_NORM, CONVENTIONAL, MATCHED = "tuned", "tuned, equal norm", "conventional", "matched"
# In place of a verdict on two accuracies, one of which is of the runs that its rate was chosen on.
NO_VERDICT = "chosen and reported on the same run"
COLUMNS = (
    "loss", "method", "settings", "rule", "norm", "arm", "learning_rate", "runs", "diverged", "failed", "unfinished",
    "status", "select_on", "selection_runs", "validation", "validation_n", "validation_low", "validation_high",
    "diff_to_chosen", "diff_low", "diff_high", "p", "p_bonferroni", "may_be_best", "chosen", "at_edge",
    "benchmark", "reported_on", "reported_runs", "accuracy", "n", "ci_low", "ci_high",
)  # fmt: skip
_COSINES = (
    "pairing", "repeats", "cosine", "cosine_null", "cosine_ceiling", "cosine_relative", "cosine_low", "cosine_high",
    "cosine_verdict",
)  # fmt: skip
_ACCURACIES = (
    "n", "accuracy_diff", "diff_low", "diff_high", "p", "p_holm", "equivalence_margin", "equivalent_within",
    "p_equivalence", "p_equivalence_holm", "accuracy_verdict",
)  # fmt: skip
PAIR_COLUMNS = (
    "rates", "loss_a", "loss_b", "arm_a", "arm_b", "learning_rate_a", "learning_rate_b", *_COSINES,
    "accuracy_a", "accuracy_b", *_ACCURACIES,
)  # fmt: skip
_COUNTS = ("runs", "diverged", "failed", "unfinished", "selection_runs", "validation_n", "reported_runs", "n")
# Repeats of a chosen rate that are proposed: with three, two of them may share an initial adapter.
_REPEATS = 3

Score = Callable[[Sequence[ComparedAdapter], dict[str, str]], None]


@dataclass(frozen=True)
class Benchmarks:
    """Benchmarks on which rates are chosen and on which accuracies are reported.

    Attributes:
        select_on: The benchmark on which rates are chosen.
        reported: The benchmark on which accuracies are reported.
    """

    select_on: str
    reported: str


@dataclass(frozen=True)
class Tuning:
    """The chosen rates.

    Attributes:
        rates: `tuning.csv`: one row per loss, rate and rule.
        pairs: `tuning_pairs.csv`: one row per set of rates and two losses, or a loss and the base.
        missing: The chosen rates without a verdict, with the commands that train their repeats.
    """

    rates: pd.DataFrame = field(default_factory=lambda: _typed(pd.DataFrame(columns=list(COLUMNS))))
    pairs: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PAIR_COLUMNS)))
    missing: list[str] = field(default_factory=list)


def require_other_problems(cohort: Cohort, benchmarks: Benchmarks) -> None:
    """Refuses to choose on problems that are reported: the best of several scores is too high on its own problems.

    Raises:
        InputError: No run was scored on both, or one was scored on the same problem for both.
    """
    chosen, reported = benchmarks.select_on, benchmarks.reported
    if chosen == reported:
        raise InputError(
            f"select_on={chosen}: accuracies are reported on it; rates must be chosen on other problems "
            "(train.py benchmark=[own,validation])"
        )
    scored = {member.run: cohort.scores.benchmarks(member.run) for member in cohort.members if member.run}
    run = next((run for run, names in scored.items() if {chosen, reported} <= set(names)), None)
    if run is None and any(chosen in names for names in scored.values()):
        raise InputError(f"select_on={chosen}: no run was scored on both it and {reported}")
    if run is None:
        others = ", ".join(sorted({name for names in scored.values() for name in names})) or "no benchmark"
        raise InputError(f"select_on={chosen}: no run was scored on it, only on {others}")
    seen, unseen = (set(by_problem(cohort.scores, run, name).index) for name in (chosen, reported))
    if seen & unseen:
        raise InputError(
            f"select_on={chosen}: {len(seen & unseen)} of its {len(seen)} problems are also in {reported}, on which "
            "accuracies are reported; rates must be chosen on other problems"
        )


def tune(
    cohort: Cohort, arms: Sequence[Arm], benchmarks: Benchmarks, arm_pairs: pd.DataFrame, norms: pd.DataFrame,
    margin: float, score: Score,
) -> Tuning:  # fmt: skip
    """Chooses the rate of every loss, by both rules, and compares the losses at these rates.

    Args:
        cohort: The runs at their ends.
        arms: Their arms.
        benchmarks: Where rates are chosen and reported.
        arm_pairs: One row for every two arms, with their cosine.
        norms: `trajectories.csv`: the norm of each run with snapshots at each of them.
        margin: The difference in accuracy, a share, below which two losses are equivalent.
        score: Scores runs at a snapshot as their ends were scored; adds to a mapping why it cannot.

    Raises:
        InputError: Two rates were not scored on the same problems.
    """
    arms = with_unfinished([arm for arm in arms if arm.members or arm.diverged], cohort.unfinished)
    validation = outcomes_of(cohort, arms, benchmarks.select_on)
    losses = losses_of(arms)
    scored = [loss for loss in losses if any(arm.name() in validation for arm in loss.arms)]
    reported = outcomes_of(cohort, arms, benchmarks.reported)
    rows = [row for loss in losses for row in rate_rows(loss, validation, reported)]
    rates = {
        CONVENTIONAL: lambda arm: arm.at_conventional_rate,
        MATCHED: lambda arm: arm.learning_rate == arm.base_rate,
    }
    pairs = _pair_rows(TUNED, _chosen(scored, rows, reported), reported.get(BASE), arm_pairs, margin)
    for name, holds in rates.items():
        pairs += _pair_rows(name, _named(scored, holds, reported), reported.get(BASE), arm_pairs, margin)
    target = common_norm(scored, norms)
    if target is None:
        cohort.left_out[f"choice of rates at {NORM}"] = "not every loss has runs with snapshots (optim.snapshot_steps)"
    else:
        with_snapshots = replace(cohort, members=[s for s in cohort.members if s.name in set(norms["run"])])
        moved, why = _at_norm(with_snapshots, target, score)
        there = _moved(arms, moved)
        validation = outcomes_of(moved, there, benchmarks.select_on)
        if not why and not validation.keys() - {BASE}:
            why = (
                f"runs are scored at snapshots only on the benchmarks of their training, not on {benchmarks.select_on}"
            )
        if why:
            cohort.left_out[f"choice of rates at {NORM}"] = why
        else:
            at_norm = outcomes_of(moved, there, benchmarks.reported)
            further = [row for loss in losses for row in rate_rows(loss, validation, at_norm, target)]
            rows += further
            # Cosines are of the ends of the runs; analyze.py checkpoint=norm compares the weights at one norm.
            of = _chosen(scored, further, at_norm)
            pairs += _pair_rows(TUNED_NORM, of, at_norm.get(BASE), arm_pairs.iloc[:0], margin)
    constant = {"select_on": benchmarks.select_on, "benchmark": benchmarks.reported}
    table = pd.DataFrame([{**row, **constant} for row in rows], columns=list(COLUMNS))
    compared = pd.DataFrame(pairs, columns=list(PAIR_COLUMNS)).astype({"n": "Int64"})
    return Tuning(_typed(table), compared, missing_repeats(losses, rows))


def missing_repeats(losses: Sequence[TunedLoss], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each chosen rate that gets no verdict, with the command that trains its repeats."""
    same = {row["arm"] for row in rows if row["chosen"] and row.get("reported_on") == SAME_RUNS}
    return [
        f"{loss.name} at {arm.learning_rate:g}: {NO_VERDICT}; for a verdict: {repeat_command(loss, arm)}"
        for loss in losses
        for arm in loss.arms
        if arm.name() in same
    ]


def repeat_command(loss: TunedLoss, arm: Arm) -> str:
    """Returns the command that trains an arm at seeds that took no part in the choice of its rate.

    It is the command line of one of its runs, with the loss, its options, the rate and the seeds replaced. Where
    initial adapters recur every three seeds, as in `experiment=tuned`, the seeds have others than those of the choice.
    """
    run = next((member.run for member in arm.members if member.run), None)
    recorded = run.manifest.get("command") if run else None
    words = shlex.split(recorded) if isinstance(recorded, str) else ["python", "train.py", "experiment=tuned"]
    own_class = any(word.startswith("method._target_=") for word in words)  # its name is no configuration
    ours = re.compile(r"[+~]*(lr|lr\.factor|lr\.peak|seed" + r"|method(\.[\w.]+)?" * (not own_class) + ")=")
    own_peak = any(re.match(r"\+*lr\.peak=", word) for word in words)
    values = flatten(run.manifest.get("config") or {}) if run else {}
    words = [_one_value(word, values) for word in words if not ours.match(word)]
    if not {"-m", "--multirun"} & set(words) and not any(word.startswith("experiment=") for word in words):
        words.append("-m")
    lr = arm.facts.config.lr
    on_grid = lr.factor is not None and lr.name == f"x{lr.factor}"
    if not own_class:
        recorded_options = in_current_words(builtin_methods().get(arm.method, Method), arm.facts.identity["method"])
        options = {key: value for key, value in recorded_options.items() if key not in ("name", "version")}
        words += [f"method={arm.method}"]
        words += [
            f"method.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()
        ]
    words += ["lr=grid", f"lr.factor={lr.factor}"] if on_grid else [f"lr={lr.name}"]
    words += [f"lr.peak={lr.peak!r}"] if own_peak else []
    used = {seed for seed, _ in loss.seeds}
    starts = {seed % 3 for seed in used}
    seeds = (seed for seed in count(1) if seed not in used and (seed % 3 not in starts or len(starts) == 3))
    return shlex.join([*words, f"seed={','.join(map(str, islice(seeds, _REPEATS)))}"])


def _one_value(word: str, values: Mapping[str, Any]) -> str:
    """Replaces the values that a sweep goes through (`init_seed=0,1`) by that of one run, where it records one."""
    name, given, value = word.partition("=")
    several = given and "," in value and not value.startswith(("[", "{", "'", '"'))
    return f"{name}={values[name]}" if several and name in values else word


@dataclass(frozen=True)
class _Entry:
    """A loss at one rate: its arm, its answers by problem, and whether these are of the runs it was chosen on."""

    arm: Arm
    outcomes: pd.DataFrame
    same_runs: bool


def _chosen(losses: Sequence[TunedLoss], rows: Sequence[Mapping[str, Any]], outcomes: Outcomes) -> dict[str, _Entry]:
    """Returns the chosen arm of each loss, with the answers of the runs that are reported."""
    names = {row["arm"] for row in rows if row["chosen"]}
    found: dict[str, _Entry] = {}
    for loss in losses:
        for arm in loss.arms:
            if arm.name() in names:
                runs, which = loss.reported(arm, outcomes.get(arm.name(), pd.DataFrame()).columns)
                found |= _entry(loss, arm, runs, outcomes, same_runs=which == SAME_RUNS)
    return found


def _named(losses: Sequence[TunedLoss], holds: Callable[[Arm], bool], outcomes: Outcomes) -> dict[str, _Entry]:
    """Returns the arm of each loss for which `holds`; of none if there are several, as in a sweep over `lr.peak`."""
    found: dict[str, _Entry] = {}
    for loss in losses:
        arms = [arm for arm in loss.arms if arm.members and holds(arm)]
        if len(arms) == 1:
            found |= _entry(loss, arms[0], loss.planned(arms[0]), outcomes, same_runs=False)
    return found


def _entry(loss: TunedLoss, arm: Arm, runs: Sequence[str], outcomes: Outcomes, same_runs: bool) -> dict[str, _Entry]:
    known = outcomes.get(arm.name(), pd.DataFrame())
    columns = [run for run in runs if run in known]
    return {loss.name: _Entry(arm, known[columns], same_runs)} if columns else {}


def _pair_rows(
    rates: str, entries: Mapping[str, _Entry], base: pd.DataFrame | None, cosines: pd.DataFrame, margin: float
) -> list[dict[str, Any]]:
    """Compares every two losses, and each with the base; Holm's correction is for these comparisons only.

    A loss whose rate was chosen on the runs that are reported is shown, not tested.
    """
    if len(entries) < 2:
        return []
    shares = {name: entry.outcomes for name, entry in entries.items()} | ({} if base is None else {BASE: base})
    tested = [name for name in shares if name not in entries or not entries[name].same_runs]
    known = {frozenset((row["arm_a"], row["arm_b"])): row for row in cosines.to_dict("records")}
    rows = []
    family = {frozenset(pair) for pair in combinations(tested, 2)}
    for compared in compare_arms(shares, family, margin).to_dict("records"):
        names = compared["arm_a"], compared["arm_b"]
        a, b = (entries[name].arm.name() if name in entries else BASE for name in names)
        row: dict[str, Any] = {"rates": rates, "loss_a": names[0], "loss_b": names[1], "arm_a": a, "arm_b": b}
        rates_of = (entries[name].arm.learning_rate if name in entries else math.nan for name in names)
        row |= zip(("learning_rate_a", "learning_rate_b"), rates_of, strict=True)
        accuracies = (float(shares[name].mean(axis=1).mean()) for name in names)
        row |= zip(("accuracy_a", "accuracy_b"), accuracies, strict=True)
        cosine = known.get(frozenset((a, b)), {})
        row |= {name: cosine.get(name) for name in _COSINES} | {name: compared[name] for name in _ACCURACIES}
        if not set(names) <= set(tested):
            row |= {"diff_low": math.nan, "diff_high": math.nan, "accuracy_verdict": NO_VERDICT}
        rows.append(row)
    return rows


def _at_norm(cohort: Cohort, norm: float, score: Score) -> tuple[Cohort, str]:
    """Returns the runs at the first point at which ‖ΔW‖ is `norm`, scored there, and why they could not be scored.

    Runs that never reach the norm are not among them.
    """
    members = at_checkpoint(cohort.members, "norm", norm, {})
    trouble: dict[str, str] = {}
    score(members, trouble)
    # A benchmark is named by what most runs were scored on: with the ends, it has the same name here.
    scored = [*(base.run for base in cohort.bases), *(s.run for s in [*members, *cohort.members] if s.run)]
    return replace(cohort, members=members, scores=scores_of_runs(scored)), next(iter(trouble.values()), "")


def _moved(arms: Sequence[Arm], cohort: Cohort) -> list[Arm]:
    """Returns the arms with those of their runs that are members of `cohort`, which holds them at another point."""
    at = {member.name: member for member in cohort.members}
    return [replace(arm, members=[at[run.name] for run in arm.members if run.name in at]) for arm in arms]


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    flags = dict.fromkeys(("may_be_best", "chosen", "at_edge"), bool)
    return table.astype({**dict.fromkeys(_COUNTS, "Int64"), **flags})
