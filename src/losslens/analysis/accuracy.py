"""Accuracies of runs, of pairs of runs on the same problems, and over seeds.

Verdicts are given on arms only: see `losslens.analysis.arm_accuracy`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from losslens.analysis.cohort import Cohort
from losslens.analysis.manifests import StartedFacts
from losslens.analysis.pairs import Pair, all_pairs
from losslens.analysis.scores import Scores
from losslens.core.errors import InputError
from losslens.evaluation.outcomes import read_outcomes
from losslens.evaluation.statistics import bootstrap_difference, mcnemar, wilson_interval
from losslens.measures import run_measures
from losslens.measures.answers import PairAnswers, pair_answers
from losslens.runs.run import Run

RUN_COLUMNS = (
    "run", "method", "lr", "learning_rate", "rank", "model", "seed", "init_seed",
    "diverged",
    *(
        name
        for measure in run_measures()
        for name in (measure.name, *[f"{measure.name}_null"] * (measure.null is not None))
    ),
    "benchmark", "accuracy", "n", "ci_low", "ci_high",
    "base_diff", "base_diff_low", "base_diff_high",
    "finished", "tokens_correct", "base_tokens_diff", "base_tokens_low", "base_tokens_high",
)  # fmt: skip
_LEVEL = 0.05
_WHOLE_NUMBERS = {"rank": "Int64", "seed": "Int64", "init_seed": "Int64", "n": "Int64"}


def benchmark_of(cohort: Cohort, requested: str | None) -> str | None:
    """Returns the benchmark on which pairs are compared; None without runs or scores.

    Raises:
        InputError: A run was not scored on the requested benchmark.
    """
    if cohort.first is None:
        return None
    scored = {member.name: cohort.scores.benchmarks(member.run) for member in cohort.members if member.run}
    if requested is None and not any(scored.values()):
        return None
    common = sorted(set.intersection(*map(set, scored.values())))
    if requested is None and not common:
        cohort.left_out["accuracy of pairs"] = "there is no benchmark on which all runs were scored in the same way"
        return None
    benchmark = requested or cohort.first.benchmark
    if requested is None and benchmark not in common:
        # Scored on another benchmark after training.
        if benchmark is not None:
            why = f"not all runs were scored on it; pairs are compared on {common[0]}"
            cohort.left_out[f"accuracy of pairs on {benchmark}"] = why
        benchmark = common[0]
    for name, known in scored.items():
        if benchmark not in known:
            which = ", ".join(known) or "no benchmark"
            raise InputError(f"{name}: not scored on {benchmark}, only on {which}; it cannot be compared")
    return benchmark


def run_table(cohort: Cohort, sizes: pd.DataFrame) -> pd.DataFrame:
    """Builds `runs.csv`: one row per run and benchmark, the base first.

    Args:
        cohort: The compared adapters.
        sizes: The measures of each run, and of the base where they have a value.
    """
    by_run = sizes.set_index("run")
    rows: list[dict[str, Any]] = []
    for base in cohort.bases:
        facts = {"method": "base", "model": base.facts.config.model.name}
        measured = dict(by_run.loc[base.name]) if base.name in by_run.index else {}
        rows += _run_rows(cohort.scores, base.name, base.run, {**facts, **measured})
    for member in cohort.members:
        facts = {"method": "adapter"} if member.facts is None else _of_facts(member.facts)
        rows += _run_rows(cohort.scores, member.name, member.run, {**facts, **dict(by_run.loc[member.name])})
    _compare_with_base(rows, cohort)
    rows += [{"run": run.name, **_of_facts(run.facts), "diverged": run.reason} for run in cohort.diverged]
    return pd.DataFrame(rows, columns=list(RUN_COLUMNS)).astype(_WHOLE_NUMBERS)


def pair_table(cohort: Cohort, benchmark: str | None) -> pd.DataFrame:
    """Compares the accuracies of every two members: McNemar's counts and p, and difference; empty without scores.

    The p-values are for two runs and not corrected for their number; verdicts are given on arms only.

    Args:
        cohort: The compared adapters.
        benchmark: The benchmark; None leaves all cells empty.
    """
    outcomes = {
        member.name: by_problem(cohort.scores, member.run, benchmark)
        for member in cohort.members
        if member.run and benchmark
    }
    rows = [
        {"run_a": a, "run_b": b, **(compared(a, outcomes[a], b, outcomes[b]) if {a, b} <= outcomes.keys() else {})}
        for a, b in all_pairs(cohort.names)
    ]
    names = [
        "run_a", "run_b", "mcnemar_b", "mcnemar_c", "mcnemar_p", "mcnemar_midp",
        "accuracy_diff", "diff_low", "diff_high",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=names).astype({"mcnemar_b": "Int64", "mcnemar_c": "Int64"})


def pair_answers_of(
    cohort: Cohort, benchmark: str | None, copies: Mapping[str, Sequence[pd.Series]]
) -> dict[Pair, PairAnswers]:
    """Compares the answers of every two members on the benchmark; empty without scores.

    Args:
        cohort: The compared adapters.
        benchmark: The benchmark.
        copies: Outcomes of the rotated copies of runs, by problem id; those on other problems are not used.
    """
    if benchmark is None:
        return {}
    runs = {member.name: member.run for member in cohort.members if member.run}
    outcomes = {name: by_problem(cohort.scores, run, benchmark) for name, run in runs.items()}
    bases = [base.run for base in cohort.bases[:1] if benchmark in cohort.scores.benchmarks(base.run)]
    if re.search(r"-avg\d+(-|$)", benchmark):
        # The flips of two runs would share the noise of the base's samples.
        bases, copies = [], {}
        cohort.left_out["flips"] = f"{benchmark} has sampled answers; only greedy ones are the same if nothing changes"
    elif copies and cohort.first and benchmark != cohort.first.benchmark:
        copies = {}
        cohort.left_out["null of flips"] = f"the rotated copies did not answer {benchmark}"
    base = by_problem(cohort.scores, bases[0], benchmark) if bases else None
    drawn: dict[str, list[NDArray[np.float64]]] = {}
    for name, series in copies.items():
        problems = outcomes[name].index
        if all(set(copy.index) == set(problems) for copy in series):
            drawn[name] = [copy.reindex(problems).to_numpy(dtype=float) for copy in series]
        else:
            cohort.left_out["null of flips"] = f"the rotated copies did not answer the problems of {benchmark}"
    found = {}
    for a, b in all_pairs(list(runs)):
        first, second = outcomes[a], outcomes[b].reindex(outcomes[a].index)
        third = None if base is None else base.reindex(first.index)
        same_problems = set(first.index) == set(outcomes[b].index) and (third is None or not third.isna().any())
        if same_problems:
            aligned = [copy[outcomes[b].index.get_indexer(first.index)] for copy in drawn.get(b, ())]
            found[a, b] = pair_answers(
                first.to_numpy(), second.to_numpy(), None if third is None else third.to_numpy(),
                drawn.get(a, ()), aligned,
            )  # fmt: skip
    return found


def midpoint_table(cohort: Cohort, midpoints: Mapping[Pair, pd.Series]) -> pd.DataFrame:
    """Returns, for each pair, the accuracy at the midpoint and of both runs on the same problems of their data."""
    rows = []
    scores = {}
    if midpoints:
        scores = {
            s.name: by_problem(cohort.scores, s.run, s.facts.benchmark)
            for s in cohort.members
            if s.run and s.facts and s.facts.benchmark in cohort.scores.benchmarks(s.run)
        }
    for (a, b), correct in midpoints.items():
        ends = [scores[name].reindex(correct.index).mean(skipna=False) if name in scores else np.nan for name in (a, b)]
        accuracies = {"accuracy_mid": correct.mean(), "accuracy_mid_a": ends[0], "accuracy_mid_b": ends[1]}
        rows.append({"run_a": a, "run_b": b, **accuracies, "accuracy_mid_n": len(correct)})
    columns = ["run_a", "run_b", "accuracy_mid", "accuracy_mid_a", "accuracy_mid_b", "accuracy_mid_n"]
    return pd.DataFrame(rows, columns=columns)


def seed_table(cohort: Cohort, runs: pd.DataFrame) -> pd.DataFrame:
    """Builds `seeds.csv`: the spread of accuracy and norm over the seeds of each configuration with several runs."""
    groups = {s.name: s.facts.configuration for s in cohort.members if s.facts}
    trained = runs[runs["run"].isin(groups) & runs["benchmark"].notna()]
    rows = []
    for (_, benchmark), group in trained.groupby([trained["run"].map(groups), "benchmark"], sort=False):
        if len(group) < 2:
            continue
        first = group.iloc[0]
        rows.append(
            {
                **{name: first[name] for name in ("method", "lr", "learning_rate", "rank", "model")},
                "benchmark": benchmark,
                "seeds": len(group),
                "accuracy_mean": group["accuracy"].mean(),
                "accuracy_std": group["accuracy"].std(ddof=1),
                "accuracy_min": group["accuracy"].min(),
                "accuracy_max": group["accuracy"].max(),
                "norm_mean": group["norm"].mean(),
                "norm_std": group["norm"].std(ddof=1),
            }
        )
    columns = [
        "method", "lr", "learning_rate", "rank", "model", "benchmark", "seeds",
        "accuracy_mean", "accuracy_std", "accuracy_min", "accuracy_max", "norm_mean", "norm_std",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def has_collapsed(correct: pd.Series, base: pd.Series | None) -> bool:
    """True if a run collapsed: its accuracy is at most a tenth of the base's, and McNemar's exact p is at most .05.

    Args:
        correct: The share of correct samples of each problem.
        base: The same for the untrained base.
    """
    if base is None or not correct.mean() <= base.mean() / 10 < base.mean():
        return False
    return mcnemar(correct.to_numpy(), base.reindex(correct.index).to_numpy()).p <= _LEVEL


def _of_facts(facts: StartedFacts) -> dict[str, Any]:
    return {
        "method": facts.method,
        "lr": facts.config.lr.name,
        "learning_rate": facts.learning_rate,
        "rank": facts.rank,
        "model": facts.model,
        "seed": facts.config.seed,
        "init_seed": facts.config.init_seed,
        "diverged": "",
    }


def _run_rows(scores: Scores, name: str, run: Run | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for benchmark in scores.benchmarks(run) if run else []:
        correct = by_problem(scores, run, benchmark)  # type: ignore[arg-type]
        low, high = wilson_interval(float(correct.sum()), len(correct))
        score = {"accuracy": float(correct.mean()), "n": len(correct), "ci_low": low, "ci_high": high}
        outcomes = read_outcomes(scores.file(run, benchmark))  # type: ignore[arg-type]
        # pandas' mean and median of missing values alone are missing, and become NaN.
        right = outcomes.loc[outcomes["correct"], "tokens"].astype(float)
        lengths = {"finished": outcomes["finished"].astype(float).mean(), "tokens_correct": right.median()}
        rows.append({"run": name, **facts, "benchmark": benchmark, **score, **lengths})
    return rows or [{"run": name, **facts}]


def _compare_with_base(rows: list[dict[str, Any]], cohort: Cohort) -> None:
    """Fills the `base_` columns: the difference to the base and its interval over problems; marks collapsed runs."""
    runs = {member.name: member.run for member in cohort.members if member.run}
    for base in cohort.bases[:1]:  # all sweeps scored the same base
        for benchmark in cohort.scores.benchmarks(base.run):
            reference = by_problem(cohort.scores, base.run, benchmark)
            lengths = _tokens_by_problem(cohort.scores, base.run, benchmark)
            for row in rows:
                run = runs.get(row["run"]) if row.get("benchmark") == benchmark else None
                if run:
                    correct = by_problem(cohort.scores, run, benchmark)
                    comparison = compared(row["run"], correct, "the base", reference)
                    row["base_diff"] = comparison["accuracy_diff"]
                    row |= {f"base_{end}": comparison[end] for end in ("diff_low", "diff_high")}
                    row |= _length_difference(_tokens_by_problem(cohort.scores, run, benchmark), lengths)
                    if has_collapsed(correct, reference):
                        row["diverged"] = f"accuracy fell to {row['accuracy']:.1%} (base: {reference.mean():.1%})"


def by_problem(scores: Scores, run: Run, benchmark: str) -> pd.Series:
    """Returns the share of correct samples of each problem, by problem id."""
    return read_outcomes(scores.file(run, benchmark)).groupby("problem_id")["correct"].mean()


def _tokens_by_problem(scores: Scores, run: Run, benchmark: str) -> pd.Series:
    """Returns the mean tokens of the correct answers to each problem that has one, by problem id."""
    outcomes = read_outcomes(scores.file(run, benchmark))
    right = outcomes[outcomes["correct"] & outcomes["tokens"].notna()]
    return right["tokens"].astype(float).groupby(right["problem_id"]).mean()


def _length_difference(tokens: pd.Series, base: pd.Series) -> dict[str, float]:
    """Returns how much longer a run's correct answers are than the base's to the same problems, in tokens."""
    both = tokens.index.intersection(base.index)
    if both.empty:
        return {}
    x, y = tokens[both].to_numpy(), base[both].to_numpy()
    low, high = bootstrap_difference(x, y)
    return {"base_tokens_diff": float(np.mean(x - y)), "base_tokens_low": low, "base_tokens_high": high}


def compared(a: str, first: pd.Series, b: str, second: pd.Series) -> dict[str, Any]:
    """Compares the outcomes of two runs by problem; returns columns of `pairs.csv`.

    Raises:
        InputError: The runs were scored on different problems.
    """
    if set(first.index) != set(second.index):
        raise InputError(f"{a} and {b}: not scored on the same problems; they cannot be compared")
    x, y = first.to_numpy(), second.reindex(first.index).to_numpy()
    test = mcnemar(x, y)
    low, high = bootstrap_difference(x, y)
    return {
        "mcnemar_b": test.b,
        "mcnemar_c": test.c,
        "mcnemar_p": test.p,
        "mcnemar_midp": test.mid_p,
        "accuracy_diff": float(np.mean(x - y)),
        "diff_low": low,
        "diff_high": high,
    }
