"""The learning-rate-matched comparison: one row an arm, averaged over its seeds, beside SFT, usual DPO and the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import by_problem, has_collapsed
from losslens.analysis.arms import Arm, nearest, repetitions, with_seeds_of
from losslens.analysis.pairs import Pair
from losslens.analysis.subjects import Gathered, Subject
from losslens.errors import InputError
from losslens.statistics import bootstrap_difference, holm, sign_flip, wilson_interval

# Of pairs.csv: the measure, its value for a run and itself, and whether unrelated updates have one.
_TO_SFT = (
    ("cosine", 1.0, True),
    ("angle_min_left", 0.0, True),
    ("barrier_chord", 0.0, False),
    ("cka_last", 1.0, False),
)
_SIZES = ("norm", "effective_rank", "stable_rank")
_AGAINST = ("diff", "diff_low", "diff_high", "p", "p_holm", "verdict")
COLUMNS = (
    "arm", "method", "lr", "learning_rate", "settings", "same_as", "share_right", "seeds", "diverged", "collapsed",
    *(f"{size}{end}" for size in _SIZES for end in ("", "_std")),
    "cosine_to_itself",
    *(
        f"{measure}_to_sft{end}"
        for measure, _, has_null in _TO_SFT
        for end in ("", "_std", "_floor", *(["_null"] if has_null else []))
    ),
    "cosine_to_sft_same_rate", "cosine_to_sft_same_rate_std",
    *(f"cosine_to_dpo_conventional{end}" for end in ("", "_std", "_floor", "_null")),
    "benchmark", "accuracy", "accuracy_std", "accuracy_min", "accuracy_max", "n", "ci_low", "ci_high",
    *(f"{other}_{column}" for other in ("base", "sft") for column in _AGAINST),
)  # fmt: skip


@dataclass(frozen=True)
class Tabled:
    """What is averaged.

    Attributes:
        runs: One row a run, with its sizes.
        pairs: One row a pair, with its measures and floors.
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame

    def between(self, pairs: Iterable[Pair]) -> pd.DataFrame:
        """The rows of `pairs`, in whichever order their runs are named."""
        wanted = {frozenset(pair) for pair in pairs}
        together = [frozenset(pair) in wanted for pair in zip(self.pairs["run_a"], self.pairs["run_b"], strict=True)]
        return self.pairs[np.array(together, dtype=bool)]


def ablation_table(
    gathered: Gathered, arms: Sequence[Arm], reference: Subject, tabled: Tabled, benchmark: str | None
) -> pd.DataFrame:
    """One row an arm and name of its learning rate; the rows of a second name say in `same_as` whose runs they are.

    Means and standard deviations are over the runs of an arm. Comparisons pair each run with the one of the same seeds.
    Accuracies are each problem's share of right answers over the arm's runs, so tests and intervals are about problems,
    not about seeds; the spread over seeds stands beside them.
    """
    sft_arms = [arm for arm in arms if arm.method == "sft" and arm.subjects]
    rate = reference.facts.learning_rate if reference.facts else None
    outcomes = {id(arm): _outcomes(gathered, arm, benchmark) for arm in arms}
    base = _of_base(gathered, benchmark)
    rows, tests = [], []
    for arm in arms:
        sft = nearest(arm, sft_arms, rate)
        alike = [o for o in sft_arms if o.learning_rate == arm.learning_rate and arm.distance(o) == 0]
        same_rate = alike[0] if alike else None
        row = _facts(arm) | _spread(tabled.runs[tabled.runs["run"].isin([run.name for run in arm.subjects])], _SIZES)
        row |= {"cosine_to_itself": tabled.between(repetitions(arm))["cosine"].mean()}
        row |= _to_sft(arm, sft, tabled)
        row |= _mean_cosine("cosine_to_sft_same_rate", arm, same_rate, tabled)
        row |= _to_dpo(arm, arms, tabled)
        correct = outcomes[id(arm)]
        row |= _accuracy(correct, benchmark, base)
        rows.append(row)
        whole = None if correct is None else correct.mean(axis=1)
        of_sft = outcomes[id(sft)] if sft is not None and sft is not arm else None
        tests.append((whole, base, None if of_sft is None else of_sft.mean(axis=1)))
    _compare(rows, [(ours, base) for ours, base, _ in tests], "base")
    _compare(rows, [(ours, sft) for ours, _, sft in tests], "sft")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table = pd.concat([table, *(_again(row, arm) for row, arm in zip(rows, arms, strict=True))], ignore_index=True)
    return table.astype({"seeds": "Int64", "diverged": "Int64", "collapsed": "Int64", "n": "Int64"})


def _facts(arm: Arm) -> dict[str, Any]:
    return {
        "arm": arm.name(),
        "method": arm.method,
        "lr": arm.lr,
        "learning_rate": arm.learning_rate,
        "settings": arm.settings,
        "same_as": "",
        "share_right": arm.facts.trained_on.share_right,
        "seeds": len(arm.subjects),
        "diverged": len(arm.diverged),
    }


def _again(row: Mapping[str, Any], arm: Arm) -> pd.DataFrame:
    """The same runs once more under each other name of their learning rate."""
    others = [{**row, "arm": arm.name(lr), "lr": lr, "same_as": row["arm"]} for lr in arm.learning_rates[1:]]
    return pd.DataFrame(others, columns=list(COLUMNS))


def _spread(rows: pd.DataFrame, measures: Sequence[str]) -> dict[str, float]:
    once = rows.drop_duplicates("run")
    return {
        name: value
        for measure in measures
        for name, value in ((measure, once[measure].mean()), (f"{measure}_std", once[measure].std(ddof=1)))
    }


def _pairs_with(arm: Arm, other: Arm | None) -> list[Pair]:
    """Each run of `arm` with the one of `other` that has its seeds."""
    partners = [(run, with_seeds_of(run, other)) for run in arm.subjects]
    return [(run.name, partner.name) for run, partner in partners if partner]


def _to_sft(arm: Arm, sft: Arm | None, tabled: Tabled) -> dict[str, float]:
    row: dict[str, float] = {}
    rows = tabled.between(repetitions(arm) if sft is arm else _pairs_with(arm, sft))
    for measure, of_itself, has_null in _TO_SFT:
        columns = _columns(f"{measure}_to_sft", measure, arm, sft, rows, tabled)
        if sft is arm and tabled.pairs[measure].notna().any():
            columns |= {f"{measure}_to_sft": of_itself, f"{measure}_to_sft_std": np.nan}
        row |= columns | ({f"{measure}_to_sft_null": rows[f"{measure}_null"].mean()} if has_null else {})
    return row


def _columns(
    name: str, measure: str, arm: Arm, other: Arm | None, rows: pd.DataFrame, tabled: Tabled
) -> dict[str, float]:
    """Mean and spread of a measure over pairs of two arms, and what the two show against themselves."""
    own = [tabled.between(repetitions(each))[measure].mean() for each in (arm, other) if each is not None]
    known = np.array([value for value in own if not np.isnan(value)])
    if not known.size:
        floor = np.nan
    elif measure == "cosine":
        # Two losses that pull in one direction, each with noise of its own, have a cosine of √(ρ·ρ').
        floor = float(np.prod(np.maximum(known, 0.0)) ** (1 / known.size))
    else:
        floor = float(known.mean())
    return {name: rows[measure].mean(), f"{name}_std": rows[measure].std(ddof=1), f"{name}_floor": floor}


def _mean_cosine(name: str, arm: Arm, other: Arm | None, tabled: Tabled) -> dict[str, float]:
    if other is arm:
        return {name: 1.0}
    rows = tabled.between(_pairs_with(arm, other))
    return {name: rows["cosine"].mean(), f"{name}_std": rows["cosine"].std(ddof=1)}


def _to_dpo(arm: Arm, arms: Sequence[Arm], tabled: Tabled) -> dict[str, float]:
    """Against DPO at its conventional rate; where the sweep has several, its usual β and loss count."""
    candidates = [other for other in arms if other.method == "dpo" and other.subjects and other.at_a_tenth]
    candidates.sort(key=lambda other: (not _is_usual_dpo(other.values), other.base_rate != arm.base_rate))
    dpo = nearest(arm, candidates, None)
    name = "cosine_to_dpo_conventional"
    rows = tabled.between(repetitions(arm) if dpo is arm else _pairs_with(arm, dpo))
    columns = _columns(name, "cosine", arm, dpo, rows, tabled) | {f"{name}_null": rows["cosine_null"].mean()}
    return columns | ({name: 1.0, f"{name}_std": np.nan} if dpo is arm else {})


def _is_usual_dpo(values: Mapping[str, Any]) -> bool:
    return values.get("method.beta") == 0.1 and values.get("method.loss_type") == "sigmoid"


def _of_base(gathered: Gathered, benchmark: str | None) -> pd.Series | None:
    if benchmark and gathered.bases and benchmark in gathered.scores.benchmarks(gathered.bases[0].run):
        return by_problem(gathered.scores, gathered.bases[0].run, benchmark)
    return None


def _outcomes(gathered: Gathered, arm: Arm, benchmark: str | None) -> pd.DataFrame | None:
    """Each problem's share of right samples, one column a run; None where none was scored."""
    if benchmark is None:
        return None
    found = {
        run.name: by_problem(gathered.scores, run.run, benchmark)
        for run in arm.subjects
        if run.run and benchmark in gathered.scores.benchmarks(run.run)
    }
    return pd.DataFrame(found) if found else None


def _accuracy(correct: pd.DataFrame | None, benchmark: str | None, base: pd.Series | None) -> dict[str, Any]:
    if correct is None:
        return {"collapsed": 0}
    by_run = correct.mean()
    low, high = wilson_interval(float(correct.mean(axis=1).sum()), len(correct))
    return {
        "collapsed": sum(has_collapsed(accuracy, base) for accuracy in by_run),
        "benchmark": benchmark,
        "accuracy": by_run.mean(),
        "accuracy_std": by_run.std(ddof=1),
        "accuracy_min": by_run.min(),
        "accuracy_max": by_run.max(),
        "n": len(correct),
        "ci_low": low,
        "ci_high": high,
    }


def _compare(
    rows: list[dict[str, Any]], outcomes: Sequence[tuple[pd.Series | None, pd.Series | None]], name: str
) -> None:
    """Fills the columns `<name>_…`: the difference to `name`, problem by problem; Holm's family are the arms."""
    found: dict[int, dict[str, Any]] = {}
    differing: dict[int, int] = {}
    for number, (ours, theirs) in enumerate(outcomes):
        if ours is None or theirs is None:
            continue
        if set(ours.index) != set(theirs.index):
            raise InputError(f"{rows[number]['arm']} and {name}: not scored on the same problems; they do not compare")
        x, y = ours.to_numpy(), theirs.reindex(ours.index).to_numpy()
        low, high = bootstrap_difference(x, y)
        found[number] = {"diff": float(np.mean(x - y)), "diff_low": low, "diff_high": high, "p": sign_flip(x, y)}
        differing[number] = int(np.sum(np.abs(x - y) > 1e-9))
    corrected = holm([columns["p"] for columns in found.values()])
    for (number, columns), p in zip(found.items(), corrected, strict=True):
        if p <= 0.05:
            verdict = "better" if columns["diff"] > 0 else "worse"
        elif not differing[number]:
            verdict = "same answers"
        else:  # of m differences all of one sign have the smallest p, 2/2ᵐ
            verdict = "underpowered" if 2 / 2.0 ** differing[number] > 0.05 / len(found) else "not significant"
        columns |= {"p_holm": float(p), "verdict": verdict}
        rows[number] |= {f"{name}_{column}": value for column, value in columns.items()}
