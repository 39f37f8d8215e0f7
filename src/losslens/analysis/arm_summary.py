"""Summary of arms, averaged over seeds and compared with SFT, conventional DPO and the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import has_collapsed
from losslens.analysis.arm_accuracy import BASE
from losslens.analysis.arms import Arm, nearest
from losslens.analysis.cohort import ComparedAdapter
from losslens.evaluation.statistics import wilson_interval
from losslens.measures import PairMeasure, pair_measures, run_measures

_SIZES = tuple(measure.name for measure in run_measures())
_AGAINST = ("diff", "diff_low", "diff_high", "p", "p_holm", "equivalence_margin", "equivalent_within", "verdict")


def _columns_of(measure: PairMeasure, to: str) -> dict[str, str]:
    """Maps the columns of a measure against another arm to those of `arm_pairs.csv`."""
    return {f"{measure.name}_to_{to}{end}": f"{measure.name}{end}" for end in measure.endings}


_SFT = {name: column for measure in pair_measures("main") for name, column in _columns_of(measure, "sft").items()}
_DPO = {
    name: column
    for m in pair_measures()
    if m.name == "cosine"
    for name, column in _columns_of(m, "dpo_conventional").items()
}
COLUMNS = (
    "arm", "method", "lr", "learning_rate", "settings", "alias_of", "samples", "pass_rate",
    "seeds", "diverged", "collapsed",
    *(f"{size}{end}" for size in _SIZES for end in ("", "_std")),
    "cosine_repeat", "sft", "pairing", "repeats", "repeat_kind", *_SFT, "cosine_to_sft_same_rate", *_DPO,
    "benchmark", "accuracy", "accuracy_std", "accuracy_min", "accuracy_max", "n", "ci_low", "ci_high",
    *(f"{other}_{column}" for other in ("base", "sft") for column in _AGAINST),
)  # fmt: skip
_COUNTS = ("seeds", "diverged", "collapsed", "repeats", "n")


@dataclass(frozen=True)
class SummaryTables:
    """Tables from which the summary is built.

    Attributes:
        runs: One row per run, with its weight measures.
        arm_pairs: One row for every two arms, and for each arm with itself, with measures and accuracies.
        outcomes: For each arm (and the base), the share of correct answers by problem, one column per run.
        benchmark: The benchmark of the outcomes.
    """

    runs: pd.DataFrame
    arm_pairs: pd.DataFrame
    outcomes: Mapping[str, pd.DataFrame]
    benchmark: str | None

    def between(self, arm: Arm, other: str | None) -> Mapping[str, Any]:
        """Returns the row of two arms, oriented so that `arm` comes first; empty if they were not compared."""
        a, b = self.arm_pairs["arm_a"], self.arm_pairs["arm_b"]
        name = arm.name()
        rows = self.arm_pairs[((a == name) & (b == other)) | ((a == other) & (b == name))]
        return _oriented(rows.iloc[0].to_dict(), name) if len(rows) else {}


def arm_summary_table(arms: Sequence[Arm], reference: ComparedAdapter, tables: SummaryTables) -> pd.DataFrame:
    """Builds `arms.csv`: one row per arm and name of its learning rate; `alias_of` marks rows of a second name.

    Weight measures are means over the runs of an arm, with standard deviations. Comparisons of two arms come from their
    row of `arm_pairs.csv`, and repeats from the row of an arm with itself. Accuracies are shares of correct answers by
    problem over the arm's runs, so tests and intervals are over problems, not over seeds; the spread over seeds is
    given as well.
    """
    sft_arms = [arm for arm in arms if arm.method == "sft" and arm.members]
    rate = reference.facts.learning_rate if reference.facts else None
    base = tables.outcomes.get(BASE)
    rows = []
    for arm in arms:
        sft = nearest(arm, sft_arms, rate)
        matched = [o for o in sft_arms if o.learning_rate == arm.learning_rate and arm.distance(o) == 0]
        row = _facts(arm) | _spread(tables.runs[tables.runs["run"].isin([run.name for run in arm.members])], _SIZES)
        own = tables.between(arm, arm.name())
        to_sft = tables.between(arm, sft.name() if sft else None)
        row |= {"cosine_repeat": own.get("cosine"), "sft": sft.name() if sft else ""}
        row |= {name: to_sft.get(name) for name in ("pairing", "repeats", "repeat_kind")}
        row |= {name: to_sft.get(column) for name, column in _SFT.items()}
        row |= {"cosine_to_sft_same_rate": tables.between(arm, matched[0].name()).get("cosine") if matched else None}
        dpo = _usual_dpo(arm, arms)
        to_dpo = tables.between(arm, dpo.name() if dpo else None)
        row |= {name: to_dpo.get(column) for name, column in _DPO.items()}
        row |= _accuracy(tables.outcomes.get(arm.name()), tables.benchmark, base)
        row |= _against("base", tables.between(arm, BASE)) | ({} if sft is arm else _against("sft", to_sft))
        rows.append(row)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = pd.concat([table, *(_aliases(row, arm) for row, arm in zip(rows, arms, strict=True))], ignore_index=True)
    return table.astype(dict.fromkeys(_COUNTS, "Int64"))


def _oriented(row: dict[str, Any], arm: str) -> dict[str, Any]:
    """Returns the row with `arm` first; only the difference in accuracy depends on the order."""
    if row["arm_a"] == arm:
        return row
    row |= {"accuracy_diff": -row["accuracy_diff"], "diff_low": -row["diff_high"], "diff_high": -row["diff_low"]}
    verdict = row["accuracy_verdict"]
    return row | {"accuracy_verdict": {"better": "worse", "worse": "better"}.get(verdict, verdict)}


def _facts(arm: Arm) -> dict[str, Any]:
    return {
        "arm": arm.name(),
        "method": arm.method,
        "lr": arm.lr,
        "learning_rate": arm.learning_rate,
        "settings": arm.settings,
        "alias_of": "",
        "samples": "own" if arm.facts.own_samples else "frozen",
        "pass_rate": arm.facts.trained_on.pass_rate,
        "seeds": len(arm.members),
        "diverged": len(arm.diverged),
    }


def _aliases(row: Mapping[str, Any], arm: Arm) -> pd.DataFrame:
    """Repeats the row under each further name of the arm's learning rate."""
    others = [{**row, "arm": arm.name(lr), "lr": lr, "alias_of": row["arm"]} for lr in arm.learning_rates[1:]]
    return pd.DataFrame(others, columns=list(COLUMNS))


def _spread(rows: pd.DataFrame, measures: Sequence[str]) -> dict[str, float]:
    once = rows.drop_duplicates("run")
    return {
        name: value
        for measure in measures
        for name, value in ((measure, once[measure].mean()), (f"{measure}_std", once[measure].std(ddof=1)))
    }


def _usual_dpo(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Returns DPO at its conventional rate; of several, the one with the usual β and loss."""
    candidates = [other for other in arms if other.method == "dpo" and other.members and other.at_conventional_rate]
    usual = {"method.beta": 0.1, "method.loss_type": "sigmoid"}
    candidates.sort(key=lambda other: (not usual.items() <= other.values.items(), other.base_rate != arm.base_rate))
    return nearest(arm, candidates, None)


def _accuracy(correct: pd.DataFrame | None, benchmark: str | None, base: pd.DataFrame | None) -> dict[str, Any]:
    if correct is None:
        return {"collapsed": 0}
    by_run = correct.mean()
    low, high = wilson_interval(float(correct.mean(axis=1).sum()), len(correct))
    untrained = None if base is None else base.iloc[:, 0]
    return {
        "collapsed": sum(has_collapsed(correct[run], untrained) for run in correct),
        "benchmark": benchmark,
        "accuracy": by_run.mean(),
        "accuracy_std": by_run.std(ddof=1),
        "accuracy_min": by_run.min(),
        "accuracy_max": by_run.max(),
        "n": len(correct),
        "ci_low": low,
        "ci_high": high,
    }


def _against(other: str, row: Mapping[str, Any]) -> dict[str, Any]:
    columns = {"diff": "accuracy_diff", "verdict": "accuracy_verdict"}
    return {f"{other}_{name}": row.get(columns.get(name, name), np.nan) for name in _AGAINST}
