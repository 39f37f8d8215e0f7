"""Accuracies of arms: the share of correct answers by problem over an arm's runs, with one test per comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import by_problem
from losslens.analysis.arms import Arm
from losslens.analysis.cohort import Cohort
from losslens.core.errors import InputError
from losslens.evaluation.statistics import (
    bootstrap_difference,
    detectable_difference,
    equivalence,
    holm,
    sign_flip,
    verdict,
)

# Name of the untrained base among the arms.
BASE = "base"
COLUMNS = (
    "arm_a", "arm_b", "n", "accuracy_diff", "diff_low", "diff_high", "p", "p_holm", "equivalence_margin",
    "equivalent_within", "p_equivalence", "p_equivalence_holm", "accuracy_verdict", "detectable_diff",
)  # fmt: skip
_LEVEL = 0.05


def outcomes_of(cohort: Cohort, arms: Sequence[Arm], benchmark: str | None) -> dict[str, pd.DataFrame]:
    """Returns, for each scored arm and the base, the share of correct samples by problem, one column per run."""
    if benchmark is None:
        return {}
    scores = cohort.scores
    runs = {arm.name(): [(member.name, member.run) for member in arm.members if member.run] for arm in arms}
    runs |= {BASE: [(base.name, base.run) for base in cohort.bases[:1]]}  # all sweeps scored the same base
    columns_by_arm = {
        arm: {name: by_problem(scores, run, benchmark) for name, run in own if benchmark in scores.benchmarks(run)}
        for arm, own in runs.items()
    }
    return {name: pd.DataFrame(columns) for name, columns in columns_by_arm.items() if columns}


def compare_arms(
    outcomes: Mapping[str, pd.DataFrame], family: Collection[frozenset[str]] | None, margin: float
) -> pd.DataFrame:
    """Compares the accuracies of every two scored arms and the base; `accuracy_diff` is the first minus the second.

    Difference, interval and p are of the same quantity, the share of correct answers by problem over the runs of an
    arm. The interval is a bootstrap over problems; p comes from a sign-flip test of the differences by problem (for two
    single runs, McNemar's exact test), and that of a difference of at least `margin` from two one-sided tests
    (`equivalence`). Each of the two is corrected by Holm for the whole table.

    Args:
        outcomes: For each arm, the share of correct answers by problem, one column per run.
        family: The comparisons that are tested and covered by Holm's correction; by default all.
        margin: The difference, a share, below which two arms are equivalent.

    Raises:
        InputError: Two arms were not scored on the same problems.
    """
    rows: list[dict[str, Any]] = []
    for a, b in combinations(outcomes, 2):
        first, second = outcomes[a], outcomes[b]
        if set(first.index) != set(second.index):
            raise InputError(f"{a} and {b}: not scored on the same problems; they cannot be compared")
        x, y = first.mean(axis=1).to_numpy(), second.mean(axis=1).reindex(first.index).to_numpy()
        tested = family is None or frozenset((a, b)) in family
        rows.append({"arm_a": a, "arm_b": b, **compare_outcomes(x, y, margin if tested else None)})
    judge(rows)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"n": "Int64"})


def compare_outcomes(first: np.ndarray, second: np.ndarray, margin: float | None) -> dict[str, Any]:
    """Compares shares of correct answers by problem, shape (problems,); returns columns of the tables.

    Args:
        first: The shares of the first side.
        second: Those of the second side.
        margin: The margin of equivalence, a share; None: the difference is not tested.
    """
    low, high = bootstrap_difference(first, second)
    row: dict[str, Any] = {"n": len(first), "accuracy_diff": float(np.mean(first - second))}
    row |= {"diff_low": low, "diff_high": high, "differing": int(np.sum(np.abs(first - second) > 1e-9))}
    if margin is not None:
        test = equivalence(first, second, margin)
        single = bool(np.isin([first, second], [0, 1]).all())
        row |= {"p": sign_flip(first, second), "single": single, "equivalence_margin": margin}
        row |= {"p_equivalence": test.p, "equivalent_within": test.within}
    return row


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Corrects the p-values of all tested rows of `compare_outcomes` as one family, and adds the verdicts."""
    tested = [row for row in rows if "p" in row]
    corrected = (holm([row[p] for row in tested]) for p in ("p", "p_equivalence"))
    for row, p, p_equivalence in zip(tested, *corrected, strict=True):
        row |= {"p_holm": float(p), "p_equivalence_holm": float(p_equivalence)}
        row["accuracy_verdict"] = verdict(row["accuracy_diff"], p, p_equivalence, _LEVEL)
        if row["single"]:  # McNemar's test needs outcomes of 0 and 1, not averages
            row["detectable_diff"] = detectable_difference(row["differing"], row["n"], _LEVEL / len(tested))
