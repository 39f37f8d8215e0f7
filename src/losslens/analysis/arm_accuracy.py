"""Accuracies of arms: each problem's share right over an arm's runs, and one test of every comparison."""

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
from losslens.evaluation.statistics import bootstrap_difference, detectable_difference, holm, sign_flip, verdict

# What the untrained base is called among the arms.
BASE = "base"
COLUMNS = (
    "arm_a", "arm_b", "n", "accuracy_diff", "diff_low", "diff_high", "p", "p_holm", "accuracy_verdict",
    "detectable_diff",
)  # fmt: skip
_LEVEL = 0.05


def outcomes_of(cohort: Cohort, arms: Sequence[Arm], benchmark: str | None) -> dict[str, pd.DataFrame]:
    """By arm each problem's share of right samples, one column a run; the base is one of them, what has none is not."""
    if benchmark is None:
        return {}
    scores = cohort.scores
    runs = {arm.name(): [(member.name, member.run) for member in arm.members if member.run] for arm in arms}
    runs |= {BASE: [(base.name, base.run) for base in cohort.bases[:1]]}  # each sweep has scored the same one
    found = {
        arm: {name: by_problem(scores, run, benchmark) for name, run in own if benchmark in scores.benchmarks(run)}
        for arm, own in runs.items()
    }
    return {name: pd.DataFrame(columns) for name, columns in found.items() if columns}


def compare_arms(outcomes: Mapping[str, pd.DataFrame], family: Collection[frozenset[str]] | None) -> pd.DataFrame:
    """One row for every two arms that were scored, the base among them: `accuracy_diff` of the first over the second.

    Difference, interval and p are of one quantity, each problem's share right over the runs of an arm. The interval is
    a bootstrap over problems, p that of flipping the signs of the problems' differences (for two single runs this is
    McNemar's exact test), corrected by Holm for the whole table.

    Args:
        outcomes: Of each arm each problem's share right, one column a run.
        family: The comparisons that are tested, and that Holm's correction counts. By default all.

    Raises:
        InputError: Two arms were not scored on the same problems.
    """
    rows: list[dict[str, Any]] = []
    for a, b in combinations(outcomes, 2):
        first, second = outcomes[a], outcomes[b]
        if set(first.index) != set(second.index):
            raise InputError(f"{a} and {b}: not scored on the same problems; they do not compare")
        x, y = first.mean(axis=1).to_numpy(), second.mean(axis=1).reindex(first.index).to_numpy()
        low, high = bootstrap_difference(x, y)
        row: dict[str, Any] = {"arm_a": a, "arm_b": b, "n": len(x), "accuracy_diff": float(np.mean(x - y))}
        row |= {"diff_low": low, "diff_high": high, "differing": int(np.sum(np.abs(x - y) > 1e-9))}
        if family is None or frozenset((a, b)) in family:
            row |= {"p": sign_flip(x, y), "single": bool(np.isin([x, y], [0, 1]).all())}
        rows.append(row)
    tested = [row for row in rows if "p" in row]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        said = verdict(row["accuracy_diff"], row["differing"], float(p), len(tested), _LEVEL)
        row |= {"p_holm": float(p), "accuracy_verdict": said}
        if row["single"]:  # of averages a difference is no count of problems
            row["detectable_diff"] = detectable_difference(row["differing"], row["n"], _LEVEL / len(tested))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"n": "Int64"})
