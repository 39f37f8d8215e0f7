"""Every loss at its own best learning rate: the choice among the rates of a sweep, and the comparison at these rates.

Rates are chosen by the score on one benchmark and reported on another, whose problems the choice has not seen. There
are two rules. *Equal steps*: runs are compared at their ends. *Equal norm*: each run at the first point of its
trajectory that reaches one ‖ΔW‖, the largest that every loss reaches at half of its rates at least.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.analysis.accuracy import by_problem
from losslens.analysis.arm_accuracy import BASE, compare_arms, outcomes_of
from losslens.analysis.arms import Arm, settings_among
from losslens.analysis.cohort import Cohort, ComparedAdapter
from losslens.analysis.scores import scores_of_runs
from losslens.analysis.snapshots import at_checkpoint
from losslens.core.errors import InputError
from losslens.evaluation.statistics import bootstrap_difference, sign_flip, wilson_interval
from losslens.runs.run import arm_of

STEPS, NORM = "equal steps", "equal norm"
# Sets of rates at which the losses are compared with each other.
TUNED, TUNED_NORM, CONVENTIONAL, MATCHED = "tuned", "tuned, equal norm", "conventional", "matched"
COLUMNS = (
    "loss", "method", "settings", "rule", "norm", "arm", "learning_rate", "runs", "diverged",
    "select_on", "selection_runs", "validation", "validation_n", "validation_low", "validation_high",
    "diff_to_chosen", "diff_low", "diff_high", "p", "p_bonferroni", "may_be_best", "chosen", "at_edge",
    "benchmark", "accuracy", "n", "ci_low", "ci_high",
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
    "rates", "loss_a", "loss_b", "arm_a", "arm_b", "learning_rate_a", "learning_rate_b", *_COSINES, *_ACCURACIES,
)  # fmt: skip
_COUNTS = ("runs", "diverged", "selection_runs", "validation_n", "n")
_LEVEL = 0.05
# Scores that differ by less are equal: means of shares in another order of summation.
_EQUAL = 1e-9

Outcomes = Mapping[str, pd.DataFrame]
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
class TunedLoss:
    """A loss with its options, and the arms that differ only in their learning rate.

    Attributes:
        method: Its method.
        settings: The settings that distinguish it from other losses of the method; may be empty.
        arms: Its arms, by increasing learning rate.
    """

    method: str
    settings: str
    arms: list[Arm]

    @property
    def name(self) -> str:
        """Its method and settings."""
        return " ".join(part for part in (self.method, self.settings) if part)

    @property
    def candidates(self) -> list[Arm]:
        """The arms of which no run diverged."""
        return [arm for arm in self.arms if arm.members and not arm.diverged]

    @property
    def seeds(self) -> set[tuple[int, int]]:
        """Seeds of all candidates, on which the choice is made: repeats of a chosen rate alone must not change it.

        Empty if the candidates share no seeds; the choice is then made on all runs.
        """
        common = [{member.facts.seeds for member in arm.members if member.facts} for arm in self.candidates]
        return set.intersection(*common) if common else set()

    def selection(self, arm: Arm) -> list[str]:
        """Returns the names of the runs of `arm` on which the choice is made."""
        seeds = self.seeds
        return [run.name for run in arm.members if run.facts and (not seeds or run.facts.seeds in seeds)]


@dataclass(frozen=True)
class Tuning:
    """The chosen rates.

    Attributes:
        rates: `tuning.csv`: one row per loss, rate and rule.
        pairs: `tuning_pairs.csv`: one row per set of rates and two losses, or a loss and the base.
    """

    rates: pd.DataFrame = field(default_factory=lambda: _typed(pd.DataFrame(columns=list(COLUMNS))))
    pairs: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(PAIR_COLUMNS)))


def require_other_problems(cohort: Cohort, benchmarks: Benchmarks) -> None:
    """Refuses to choose on problems that are reported: the best of several scores is too high on its own problems.

    Raises:
        InputError: No run was scored on `select_on`, or one was scored on the same problem for both.
    """
    chosen, reported = benchmarks.select_on, benchmarks.reported
    if chosen == reported:
        raise InputError(
            f"select_on={chosen}: accuracies are reported on it; rates must be chosen on other problems "
            "(train.py benchmark=[own,validation])"
        )
    scored = {member.run: cohort.scores.benchmarks(member.run) for member in cohort.members if member.run}
    run = next((run for run, names in scored.items() if {chosen, reported} <= set(names)), None)
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
    arms = [arm for arm in arms if arm.members or arm.diverged]
    validation = outcomes_of(cohort, arms, benchmarks.select_on)
    losses = [loss for loss in losses_of(arms) if any(arm.name() in validation for arm in loss.arms)]
    reported = outcomes_of(cohort, arms, benchmarks.reported)
    rows = [row for loss in losses for row in rate_rows(loss, validation, reported)]
    chosen = {TUNED: _chosen(losses, rows)}
    usual = {
        CONVENTIONAL: lambda arm: arm.at_conventional_rate,
        MATCHED: lambda arm: arm.learning_rate == arm.base_rate,
    }
    chosen |= {rates: _only(losses, holds) for rates, holds in usual.items()}
    pairs = [row for rates, of in chosen.items() for row in _pair_rows(rates, of, reported, arm_pairs, margin)]
    target = common_norm(losses, norms)
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
            pairs += _pair_rows(TUNED_NORM, _chosen(losses, further), at_norm, arm_pairs.iloc[:0], margin)
    constant = {"select_on": benchmarks.select_on, "benchmark": benchmarks.reported}
    table = pd.DataFrame([{**row, **constant} for row in rows], columns=list(COLUMNS))
    return Tuning(_typed(table), pd.DataFrame(pairs, columns=list(PAIR_COLUMNS)).astype({"n": "Int64"}))


def losses_of(arms: Sequence[Arm]) -> list[TunedLoss]:
    """Groups arms that differ only in their learning rate, in the order of the tables."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        rest = {key: value for key, value in arm.facts.identity.items() if key != "learning_rate"}
        groups.setdefault(arm_of(rest), []).append(arm)
    losses = []
    for group in groups.values():
        first = group[0]
        settings = settings_among(first, [arm for arm in arms if arm.method == first.method]).split(" ")
        settings = [setting for setting in settings if not setting.startswith("learning_rate=")]
        by_rate = sorted(group, key=lambda arm: arm.learning_rate)
        losses.append(TunedLoss(first.method, " ".join(settings), by_rate))
    return losses


def rate_rows(
    loss: TunedLoss, validation: Outcomes, reported: Outcomes, norm: float | None = None
) -> list[dict[str, Any]]:
    """Chooses the best rate of a loss and compares the others with it; one row per rate, the smallest first.

    The best rate has the highest mean score on the validation problems; of equal ones, the smallest. A rate of which a
    run diverged, or does not reach the norm, is not chosen. Each other rate is tested against the best one, paired by
    problem (`sign_flip`), with Bonferroni's correction for the number of other rates k. Those with p ≤ .05 are not the
    best: for the rate that truly is, the chance that any of the k others beats it so clearly is at most 5%, so that
    `may_be_best` marks a 95% confidence set of the best rate (over problems; seeds are held fixed).

    Args:
        loss: The loss.
        validation: By arm, the share of correct answers by problem to choose by, one column per run.
        reported: The same on the problems that are reported.
        norm: ‖ΔW‖ at which the runs are compared; None for their ends.

    Raises:
        InputError: Two rates were not scored on the same problems.
    """
    scores: dict[str, pd.Series] = {}
    for arm in loss.candidates:
        runs = loss.selection(arm)
        of_runs = validation.get(arm.name())
        if of_runs is not None and runs and set(runs) <= set(of_runs):
            scores[arm.name()] = of_runs[runs].mean(axis=1)
    best = next((name for name in scores if scores[name].mean() > _highest(scores) - _EQUAL), None)
    rows = []
    for place, arm in enumerate(loss.arms):
        name = arm.name()
        points = reported.get(name, validation.get(name))
        row: dict[str, Any] = {
            "loss": loss.name, "method": loss.method, "settings": loss.settings,
            "rule": STEPS if norm is None else NORM, "norm": norm, "arm": name, "learning_rate": arm.learning_rate,
            "runs": len(arm.members) if norm is None else 0 if points is None else points.shape[1],
            "diverged": len(arm.diverged), "chosen": name == best, "may_be_best": name == best,
            "at_edge": name == best and place in (0, len(loss.arms) - 1),
        }  # fmt: skip
        if name in scores:
            low, high = wilson_interval(float(scores[name].sum()), len(scores[name]))
            row |= {"selection_runs": len(loss.selection(arm)), "validation": float(scores[name].mean())}
            row |= {"validation_n": len(scores[name]), "validation_low": low, "validation_high": high}
            if best is not None and name != best:
                row |= _against_best(name, scores, best)
        if name in reported:
            correct = reported[name].mean(axis=1)
            low, high = wilson_interval(float(correct.sum()), len(correct))
            row |= {"accuracy": float(correct.mean()), "n": len(correct), "ci_low": low, "ci_high": high}
        rows.append(row)
    return rows


def common_norm(losses: Sequence[TunedLoss], norms: pd.DataFrame) -> float | None:
    """Returns the largest ‖ΔW‖ that every loss reaches at half of its candidates, with all runs the choice is made on.

    Were one rate enough, the loss with the smallest updates would have nothing to choose from, and were all needed, the
    smallest rate of the grid would decide.

    Args:
        losses: The losses.
        norms: `run`, `step` and `norm`; runs without snapshots have no rows.

    Returns:
        None if there is none: a loss has no snapshots, or no update.
    """
    largest = norms.groupby("run")["norm"].max().to_dict() if len(norms) else {}
    by_loss = [
        sorted((min(largest.get(run, 0.0) for run in loss.selection(arm)) for arm in loss.candidates), reverse=True)
        for loss in losses
    ]
    reached = [norms[(len(norms) + 1) // 2 - 1] for norms in by_loss if norms]
    return min(reached) if reached and min(reached) > 0 else None


def _highest(scores: Mapping[str, pd.Series]) -> float:
    return max(float(score.mean()) for score in scores.values())


def _against_best(name: str, scores: Mapping[str, pd.Series], best: str) -> dict[str, Any]:
    if set(scores[name].index) != set(scores[best].index):
        raise InputError(f"{name} and {best}: not scored on the same problems; no rate can be chosen")
    x: NDArray[np.float64] = scores[name].to_numpy()
    y = scores[best].reindex(scores[name].index).to_numpy()
    p = sign_flip(x, y)
    corrected = min(1.0, p * (len(scores) - 1))
    low, high = bootstrap_difference(x, y)
    return {
        "diff_to_chosen": float(np.mean(x - y)), "diff_low": low, "diff_high": high,
        "p": p, "p_bonferroni": corrected, "may_be_best": corrected > _LEVEL,
    }  # fmt: skip


def _chosen(losses: Sequence[TunedLoss], rows: Sequence[Mapping[str, Any]]) -> dict[str, Arm]:
    names = {row["arm"] for row in rows if row["chosen"]}
    return {loss.name: arm for loss in losses for arm in loss.arms if arm.name() in names}


def _only(losses: Sequence[TunedLoss], holds: Callable[[Arm], bool]) -> dict[str, Arm]:
    """Returns the arm of each loss for which `holds`; of none if there are several, as in a sweep over `lr.peak`."""
    found = {loss.name: [arm for arm in loss.arms if arm.members and holds(arm)] for loss in losses}
    return {name: arms[0] for name, arms in found.items() if len(arms) == 1}


def _pair_rows(
    rates: str, arms: Mapping[str, Arm], outcomes: Outcomes, cosines: pd.DataFrame, margin: float
) -> list[dict[str, Any]]:
    """Compares every two losses, and each with the base; Holm's correction is for these comparisons only."""
    shares = {name: outcomes[arm.name()] for name, arm in arms.items() if arm.name() in outcomes}
    if len(shares) < 2:
        return []
    known = {frozenset((row["arm_a"], row["arm_b"])): row for row in cosines.to_dict("records")}
    rows = []
    with_base = {**shares, BASE: outcomes[BASE]} if BASE in outcomes else shares
    for tested in compare_arms(with_base, None, margin).to_dict("records"):
        names = tested["arm_a"], tested["arm_b"]
        a, b = (arms[name].name() if name in arms else BASE for name in names)
        row: dict[str, Any] = {"rates": rates, "loss_a": names[0], "loss_b": names[1], "arm_a": a, "arm_b": b}
        rates_of = (arms[name].learning_rate if name in arms else math.nan for name in names)
        row |= zip(("learning_rate_a", "learning_rate_b"), rates_of, strict=True)
        cosine = known.get(frozenset((a, b)), {})
        row |= {name: cosine.get(name) for name in _COSINES} | {name: tested[name] for name in _ACCURACIES}
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
