"""The choice of each loss's learning rate among the rates of a sweep, and the runs its accuracy is reported on.

The best of several scores is too high twice over: on its problems, and by the luck of its seed, which a run takes to
all problems. Rates are therefore chosen by the score on one benchmark, and reported on another, by runs of other seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.analysis.arms import Arm, settings_among
from losslens.analysis.cohort import ComparedAdapter, Diverged, Unfinished
from losslens.core.errors import InputError
from losslens.evaluation.statistics import bootstrap_difference, sign_flip, wilson_interval
from losslens.runs.run import arm_of

STEPS, NORM = "equal steps", "equal norm"
# What became of a rate in the choice.
COMPARED, DIVERGED, FAILED, NOT_FINISHED = "compared", "diverged", "failed", "not finished"
NO_COMMON_SEED, NOT_SCORED, NORM_NOT_REACHED = "no common seed", "not scored", "norm not reached"
# Runs that an accuracy is of: those that took no part in the choice; those it was made on; all, as nothing was chosen.
OTHER_SEEDS, SAME_RUNS, ALL_RUNS = "other seeds", "same runs", "all runs"
_LEVEL = 0.05
# Scores that differ by less are equal: means of shares in another order of summation.
_EQUAL = 1e-9

Outcomes = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class TunedLoss:
    """A loss with its options, and the arms that differ only in their learning rate.

    Attributes:
        method: Its method.
        settings: The settings that distinguish it from other losses of the method; may be empty.
        arms: Its arms, by increasing learning rate; some may have no finished run.
    """

    method: str
    settings: str
    arms: list[Arm]

    @property
    def name(self) -> str:
        """Its method and settings."""
        return " ".join(part for part in (self.method, self.settings) if part)

    @property
    def tried(self) -> list[Arm]:
        """The arms with a run that finished or diverged."""
        return [arm for arm in self.arms if _runs(arm)]

    @property
    def seeds(self) -> set[tuple[int, int | None]]:
        """Seeds that all tried rates have, finished or diverged: the choice is made on these alone.

        Repeats of one rate, and what becomes of them, hence never change the choice. Empty if the rates share no seeds;
        nothing is then chosen, as the rates would differ by their seeds, too.
        """
        of_rates = [{facts.seeds for run in _runs(arm) if (facts := run.facts)} for arm in self.tried]
        return set.intersection(*of_rates) if of_rates else set()

    @property
    def candidates(self) -> list[Arm]:
        """The arms of which no run at the seeds of the choice diverged."""
        return [arm for arm in self.tried if self.selection(arm) and not self.diverged(arm)]

    def selection(self, arm: Arm) -> list[str]:
        """Returns the names of the finished runs of `arm` at the seeds of the choice."""
        seeds = self.seeds
        return [run.name for run in arm.members if run.facts and run.facts.seeds in seeds]

    def diverged(self, arm: Arm) -> bool:
        """Returns True if a run of `arm` at the seeds of the choice diverged."""
        return any(run.facts.seeds in self.seeds for run in arm.diverged)

    def reported(self, arm: Arm, scored: Collection[str]) -> tuple[list[str], str]:
        """Returns the names of the runs whose accuracy is reported for `arm`, which may be chosen, and their kind.

        They are those of other seeds than the choice, if there are any, and of these the ones from other initial
        adapters, if there are any: the luck of either is shared by the problems of both benchmarks.

        Args:
            arm: One of its arms.
            scored: Names of the runs with an accuracy to report; others are passed over.
        """
        runs = [run for run in arm.members if run.name in scored]
        if not self.seeds or len(self.tried) == 1:
            return [run.name for run in runs], ALL_RUNS
        orders, starts = ({pair[part] for pair in self.seeds} for part in (0, 1))
        others = [run for run in runs if run.facts and run.facts.seeds[0] not in orders]
        apart = [run for run in others if run.facts and run.facts.seeds[1] not in starts]
        fresh = [run.name for run in apart or others]
        return (fresh, OTHER_SEEDS) if fresh else ([n for n in self.selection(arm) if n in scored], SAME_RUNS)

    def planned(self, arm: Arm) -> list[str]:
        """Returns the names of the runs whose accuracy is reported for `arm` if its rate was named beforehand.

        They are those at the seeds that all rates have: whether there are others may depend on how well these did.
        """
        return self.selection(arm) if self.seeds else [run.name for run in arm.members]


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


def with_unfinished(arms: Sequence[Arm], unfinished: Sequence[Unfinished]) -> list[Arm]:
    """Returns the arms with their unfinished runs, followed by the arms of which no other run is known."""
    runs_of: dict[str, list[Unfinished]] = {}
    for run in unfinished:
        runs_of.setdefault(run.facts.configuration, []).append(run)
    known = [replace(arm, unfinished=runs_of.pop(arm.facts.configuration, [])) for arm in arms]
    further = [Arm(runs[0].facts, unfinished=runs) for runs in runs_of.values()]
    for arm in further:
        similar = [other for other in (*known, *further) if (other.method, other.lr) == (arm.method, arm.lr)]
        arm.settings = settings_among(arm, similar)
    return [*known, *further]


def rate_rows(
    loss: TunedLoss, validation: Outcomes, reported: Outcomes, norm: float | None = None
) -> list[dict[str, Any]]:
    """Chooses the best rate of a loss and compares the others with it; one row per rate, the smallest first.

    The best rate has the highest mean score on the validation problems over the seeds that all rates have; of equal
    ones, the smallest. A rate of which one of these runs diverged, or does not reach the norm, is not chosen. Each
    other rate is tested against the best one, paired by problem (`sign_flip`), with Bonferroni's correction for the
    number of other rates k. Those with p ≤ .05 are not the best: for the rate that truly is, the chance that any of the
    k others beats it so clearly is at most 5%, so that `may_be_best` marks a 95% confidence set of the best rate (over
    problems; seeds are held fixed).

    Args:
        loss: The loss.
        validation: By arm, the share of correct answers by problem to choose by, one column per run.
        reported: The same on the problems that are reported.
        norm: ‖ΔW‖ at which the runs are compared; None for their ends.

    Raises:
        InputError: Two rates were not scored on the same problems.
    """
    best, scores = best_rate(loss, validation)
    ends = {arm.name() for arm in (*loss.tried[:1], *loss.tried[-1:])}
    rows = []
    for arm in loss.arms:
        name = arm.name()
        points = reported.get(name, validation.get(name))
        failed = sum(run.state == "failed" for run in arm.unfinished)
        row: dict[str, Any] = {
            "loss": loss.name, "method": loss.method, "settings": loss.settings,
            "rule": STEPS if norm is None else NORM, "norm": norm, "arm": name, "learning_rate": arm.learning_rate,
            "runs": len(arm.members) if norm is None else 0 if points is None else points.shape[1],
            "diverged": len(arm.diverged), "failed": failed, "unfinished": len(arm.unfinished) - failed,
            "status": COMPARED if name in scores else _status(loss, arm, norm),
            "chosen": name == best, "may_be_best": name == best, "at_edge": name == best and name in ends,
        }  # fmt: skip
        if name in scores:
            low, high = wilson_interval(float(scores[name].sum()), len(scores[name]))
            row |= {"selection_runs": len(loss.selection(arm)), "validation": float(scores[name].mean())}
            row |= {"validation_n": len(scores[name]), "validation_low": low, "validation_high": high}
            if best is not None and name != best:
                row |= _against_best(name, scores, best)
        rows.append(row | _accuracy(loss, arm, reported.get(name)))
    return rows


def best_rate(loss: TunedLoss, validation: Outcomes) -> tuple[str | None, dict[str, pd.Series]]:
    """Returns the arm with the highest mean score, of equal ones that with the smallest rate; and all scores.

    Args:
        loss: The loss.
        validation: By arm, the share of correct answers by problem to choose by, one column per run.

    Returns:
        The name of the arm, None without candidates; by candidate, its score on each problem.
    """
    scores: dict[str, pd.Series] = {}
    for arm in loss.candidates:
        runs = loss.selection(arm)
        of_runs = validation.get(arm.name())
        if of_runs is not None and set(runs) <= set(of_runs):
            scores[arm.name()] = of_runs[runs].mean(axis=1)
    means = {name: float(score.mean()) for name, score in scores.items()}
    best = next((name for name, mean in means.items() if mean > max(means.values()) - _EQUAL), None)
    return best, scores


def _accuracy(loss: TunedLoss, arm: Arm, reported: pd.DataFrame | None) -> dict[str, Any]:
    """Returns the accuracy of a rate, with a Wilson interval over problems, and the runs it is of."""
    names, which = loss.reported(arm, () if reported is None else reported.columns)
    if reported is None or not names:
        return {}
    correct = reported[names].mean(axis=1)
    low, high = wilson_interval(float(correct.sum()), len(correct))
    row = {"reported_on": which, "reported_runs": len(names), "accuracy": float(correct.mean())}
    return row | {"n": len(correct), "ci_low": low, "ci_high": high}


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


def _runs(arm: Arm) -> list[ComparedAdapter | Diverged]:
    return [*arm.members, *arm.diverged]


def _status(loss: TunedLoss, arm: Arm, norm: float | None) -> str:
    """Returns why a rate without a score has none."""
    if not _runs(arm):
        return FAILED if any(run.state == "failed" for run in arm.unfinished) else NOT_FINISHED
    if not loss.seeds:
        return NO_COMMON_SEED
    if loss.diverged(arm):
        return DIVERGED
    return NOT_SCORED if norm is None else NORM_NOT_REACHED


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
