"""The table of the causal checks: each changed model beside the run, or the better of the two runs, it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from losslens.analysis.accuracy import by_problem
from losslens.analysis.arm_accuracy import COLUMNS as COMPARED
from losslens.analysis.arm_accuracy import compare_outcomes, judge
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort
from losslens.analysis.function_space import base_of, own_benchmark, trust_of
from losslens.analysis.interventions import Change, Intervention, equal_norm_factors, planned, scaled, unchanged
from losslens.analysis.pairs import Pair
from losslens.analysis.repeats import CROSS_SEED, pairing
from losslens.analysis.tables import shares_initial_adapter
from losslens.config.analysis import AnalyzeConfig
from losslens.core.errors import InputError, UnavailableError
from losslens.evaluation.statistics import wilson_interval
from losslens.measures.connectivity import SequenceNll, loss_difference
from losslens.updates.base import Array

COLUMNS = (
    "kind", "how", "run", "run_b", "arm", "arm_b", "pairing", "value", "draw", "null", "norm", "kl", "loss",
    "loss_diff", "loss_diff_low", "loss_diff_high", "loss_diff_repeat", "accuracy", "ci_low", "ci_high",
    "reference_accuracy", *COMPARED[2:], "accuracy_diff_repeat", "interaction", "hessian_cosine",
)  # fmt: skip
_WHAT = "interventions"
# Random halves over which the better of two runs is chosen.
_HALVES = 200


def intervention_table(
    config: AnalyzeConfig, cohort: Cohort, pairs: Sequence[Pair], arms: Mapping[str, str], cache: Cache
) -> pd.DataFrame:
    """Builds `interventions.csv`: one row per changed model, after the base and the runs themselves.

    Args:
        config: The configuration.
        cohort: The compared adapters.
        pairs: The pairs of runs to merge.
        arms: The arm of each run.
        cache: The cache.

    Raises:
        InputError: More directions are to be restored than the updates have.
    """
    settings = config.interventions
    if not settings.asked_for:
        return pd.DataFrame(columns=list(COLUMNS))
    names = _changeable(cohort)
    rank = max((rank for name in names for rank in cohort.ranks[name]), default=0)
    if names and (most := max(settings.restoring, default=0)) > rank:
        raise InputError(f"interventions.restoring={most}: the updates have at most {rank} directions in a module")
    if settings.merging and not pairs:
        cohort.left_out["merges"] = "no pairs are chosen (see pairs)"
    try:
        # These load torch and transformers.
        from losslens.analysis.base_weights import BaseWeights
        from losslens.analysis.forward_passes import ForwardPasses
        from losslens.analysis.intervention_passes import InterventionPasses
        from losslens.analysis.probe_set import TeacherForced, probe_set

        trust = trust_of(config)
        passes = ForwardPasses(*base_of(config.model_path, cohort.first, trust), cohort, cache, config.batch_size)
        frozen = probe_set(config.probe_set, config.output_dir, cohort.first, trust, config.model_path)
    except UnavailableError as error:
        cohort.left_out[_WHAT] = str(error)
        return pd.DataFrame(columns=list(COLUMNS))
    benchmark = None
    if settings.problems != 0:
        try:
            if cohort.first is None:
                raise UnavailableError("no run records the problems that it was scored on")
            benchmark = own_benchmark(config, cohort.first, settings.problems)
        except UnavailableError as error:
            cohort.left_out[f"accuracy of {_WHAT}"] = str(error)
    sequences = TeacherForced(frozen, answer_only=False)
    passes.observe(cohort.names, sequences, config.cka)
    weights = BaseWeights(passes, cohort, config.num_directions)
    measured = InterventionPasses(passes, sequences, config.cka, weights, benchmark, _recorded(cohort))
    runs = unchanged(names)
    effects = measured.measure(runs)
    whole = {name: max(cohort.ranks[name]) for name in names}
    asked = [
        intervention
        for intervention in planned(settings, names, [pair for pair in pairs if {*pair} <= {*names}])
        if not _is_whole(intervention.change, whole)
    ]
    for name, most in whole.items():
        if any(k >= most for k in settings.restoring):
            why = f"its updates have {most} directions: all of them is no cut"
            cohort.left_out[f"some restoring of {name}"] = why
    if "norm" in settings.equal:
        asked += scaled("equal_norm", equal_norm_factors({name: effects[Change((name,))].norm for name in names}))
    if "kl" in settings.equal:
        asked += scaled("equal_kl", measured.equal_kl_factors(names))
        for name, share in measured.off_target.items():
            cohort.left_out[f"equal KL of {name}"] = f"scaled, it has {share:.2g} times the smallest KL"
    effects |= measured.measure(asked)
    rows = [_row(intervention, effects, config.equivalence_margin / 100) for intervention in [*runs, *asked]]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        judge([row for row in rows if row["kind"] == kind])
    seeds = {s.name: s.facts.seeds if s.facts else None for s in cohort.members}
    own = {s.name for s in cohort.members if s.facts and s.facts.own_samples}
    for row in rows:
        row |= {"arm": arms.get(row["run"], row["run"]), "arm_b": arms.get(row["run_b"], row["run_b"])}
        a, b = row["run"], row["run_b"]
        if b:
            row["pairing"] = pairing(seeds[a], seeds[b], shares_initial_adapter(cohort, (a, b)), (a in own, b in own))
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"n": "Int64"})
    table.loc[table["run"] == "", "run"] = cohort.base_name
    return with_interactions(with_repeats(table))


def _is_whole(change: Change, ranks: Mapping[str, int]) -> bool:
    """Returns True if as many directions of an update are kept or removed as it has: the run, or the base."""
    own = change.how in ("only_top", "only_random", "without_top", "without_random")
    return own and change.value >= ranks[change.runs[0]]


def _changeable(cohort: Cohort) -> list[str]:
    """Returns the names of the runs whose updates are the compared modules alone; tells the others."""
    names = []
    for member in cohort.members:
        if member.point.base is None:
            names.append(member.name)
        elif member.point.is_whole:
            cohort.left_out[f"{_WHAT} of {member.name}"] = "a whole model changes more than the compared modules"
        else:
            cohort.left_out[f"{_WHAT} of {member.name}"] = "its update is not that of factors alone (DoRA)"
    return names


def _recorded(cohort: Cohort) -> dict[str | None, pd.Series]:
    """Returns the outcomes of all scored runs, and of the base (None), on the benchmark of their own data."""
    benchmark = cohort.first.benchmark if cohort.first else None
    runs = {member.name: member.run for member in cohort.members if member.run}
    scored = [*runs.items(), *((None, base.run) for base in cohort.bases[:1])]
    return {
        name: by_problem(cohort.scores, run, benchmark)
        for name, run in scored
        if benchmark and benchmark in cohort.scores.benchmarks(run)
    }


def _row(intervention: Intervention, effects: Mapping[Change, Any], margin: float) -> dict[str, Any]:
    change = intervention.change
    effect = effects[change]
    parents = [effects[Change((name,))] for name in change.runs]
    first, second = (*change.runs, "", "")[:2]
    row: dict[str, Any] = {
        "kind": intervention.kind, "how": change.how, "run": first, "run_b": second, "pairing": "",
        "value": np.nan if second else change.value, "draw": change.draw, "null": intervention.null,
        "norm": effect.norm, "kl": effect.kl, "loss": effect.loss.nll.sum() / effect.loss.tokens.sum(),
    }  # fmt: skip
    if effect.correct is not None:
        correct = effect.correct.to_numpy(dtype=np.float64)
        low, high = wilson_interval(float(correct.sum()), len(correct))
        row |= {"n": len(correct), "accuracy": float(correct.mean()), "ci_low": low, "ci_high": high}
    if intervention.kind == "unchanged":
        row["how"] = "run" if change.runs else "base"
        return row
    losses = [parent.loss.nll for parent in parents]
    reference = losses[0] if len(losses) == 1 else -better(*(-loss for loss in losses))
    against = loss_difference(effect.loss, SequenceNll(reference, effect.loss.tokens))
    row |= zip(("loss_diff", "loss_diff_low", "loss_diff_high"), against, strict=True)
    if effect.correct is not None:
        outcomes = [parent.correct.reindex(effect.correct.index).to_numpy(dtype=np.float64) for parent in parents]
        reference = outcomes[0] if len(outcomes) == 1 else better(*outcomes)
        tested = not (intervention.null or change.is_a_model)
        row |= {"reference_accuracy": float(reference.mean())}
        row |= compare_outcomes(correct, reference, margin if tested else None)
    return row


def better(first: Array, second: Array) -> Array:
    """Returns, for each item, the outcome of the run that is better on other items, averaged over random halves.

    The better of two runs by the items themselves looks better than it is, and whatever is compared with it there looks
    worse. Here each half of the items is compared with the run chosen on the other half (with the mean of both where
    they are equally good there), for many random halves: a single one, such as every second item, may separate kinds of
    items, and then each half has the run that is worse on it.

    Args:
        first: The outcomes of one run by item, larger is better, shape (items,).
        second: Those of the other run.
    """
    draws = np.random.default_rng(0).random((_HALVES, len(first))).argsort(axis=1)
    here = draws < len(first) // 2
    gain = first - second
    lead = np.sign(np.stack([here @ gain, ~here @ gain]))
    # Items of the one half are chosen by the lead on the other.
    share = 0.5 * (1 + np.where(here, lead[1][:, None], lead[0][:, None]).mean(axis=0))
    chosen: Array = share * first + (1 - share) * second
    return chosen


def with_repeats(table: pd.DataFrame) -> pd.DataFrame:
    """Adds to merges of two losses what merging two repeats of one of them does: the mean of the two losses' means.

    Only repeats with the same pairing count (both from one A, or neither), and runs that share their batches have none.
    """
    repeats = table[(table["kind"] == "merging") & (table["arm"] == table["arm_b"])]
    across = (table["kind"] == "merging") & (table["arm"] != table["arm_b"])
    table = table.copy()
    for name in ("loss_diff", "accuracy_diff"):
        own = repeats[repeats["pairing"].isin(CROSS_SEED)].groupby(["how", "arm", "pairing"])[name].mean()
        levels = [
            np.mean([own.get((how, arm, pairing), np.nan) for arm in (a, b)])
            for how, a, b, pairing in table.loc[across, ["how", "arm", "arm_b", "pairing"]].itertuples(index=False)
        ]
        table.loc[across, f"{name}_repeat"] = levels
    return table


def with_interactions(table: pd.DataFrame) -> pd.DataFrame:
    """Adds to each sum of two runs the interaction of their updates in the loss, and its cosine.

    I_ab = L(a + b) − L(a) − L(b) + L(0), which is aᵀHb where the loss is quadratic, and I_ab/√(I_aa·I_bb) with
    I_aa = L(2a) − 2·L(a) + L(0), where both are above 0 and 2 is among the factors of `scaling`.
    """
    loss = {(row.kind, row.how, row.run, row.value): row.loss for row in table.itertuples()}
    [base] = table.loc[table["how"] == "base", "loss"]
    table = table.copy()
    for index, row in table[(table["kind"] == "merging") & (table["how"] == "sum")].iterrows():
        a, b = (loss["unchanged", "run", run, 1.0] for run in (row["run"], row["run_b"]))
        twice = [loss.get(("scaling", "scaled", run, 2.0), np.nan) for run in (row["run"], row["run_b"])]
        own = [double - 2 * single + base for double, single in zip(twice, (a, b), strict=True)]
        table.loc[index, "interaction"] = row["loss"] - a - b + base
        if min(own) > 0:
            table.loc[index, "hessian_cosine"] = table.loc[index, "interaction"] / np.sqrt(own[0] * own[1])
    return table
