"""The analysis: gathers the cohort, measures what is not cached, and writes the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from tqdm import tqdm

from losslens.analysis.accuracy import benchmark_of, pair_answers_of, pair_table, run_table, seed_table
from losslens.analysis.arm_accuracy import BASE, compare_arms, outcomes_of
from losslens.analysis.arm_summary import SummaryTables, arm_summary_table
from losslens.analysis.arms import Arm, arm_names, arms_of, nearest, repeats, sft_partners
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort, ComparedAdapter, Diverged
from losslens.analysis.composition import tell_composition
from losslens.analysis.console import show
from losslens.analysis.function_space import Share, external_base, locate_bases, measure_function_space, trust_of
from losslens.analysis.gathering import find_runs, gather_cohort
from losslens.analysis.gradients import FindGradients, Gradients, measure_gradients
from losslens.analysis.intervention_table import intervention_table
from losslens.analysis.lineage import lineage
from losslens.analysis.loss_family import class_table, cluster_table, factor_table
from losslens.analysis.named_bases import require_model_path, require_one_base
from losslens.analysis.pairs import choose, default_reference, extended, find
from losslens.analysis.repeats import arm_pairs, repeat_table
from losslens.analysis.replacement import (
    EarlierAnalysis,
    archive_path,
    read_earlier,
    write_analysis,
)
from losslens.analysis.snapshots import at_checkpoint, score_snapshots
from losslens.analysis.tables import (
    Tables,
    cka_table,
    compared_weights,
    connectivity_table,
    mds_table,
    measured_layer_table,
    measured_pair_table,
    run_function_table,
    shift_table,
)
from losslens.analysis.training_table import training_table
from losslens.analysis.trajectories import measure_trajectories, trajectory_table
from losslens.analysis.tuning import Benchmarks, Tuning, require_other_problems, tune
from losslens.analysis.weight_space import measure_weight_space
from losslens.config.analysis import AnalyzeConfig
from losslens.config.parse import parse
from losslens.core import provenance
from losslens.core.errors import InputError
from losslens.core.files import atomic_file, write_json
from losslens.core.hashing import hash_file
from losslens.measures.tables import weight_tables
from losslens.runs.labels import labels


@dataclass(frozen=True)
class Analysis:
    """The result of an analysis.

    Attributes:
        tables: The tables.
        cohort: The compared adapters.
        facts: Entries of the manifest: settings, and what the measures were computed on.
        left_out: Names of what was left out, with the reasons.
        missing: Chosen rates without a verdict, with the commands that train what is missing.
    """

    tables: Tables
    cohort: Cohort
    facts: dict[str, Any]
    left_out: dict[str, str]
    missing: list[str]


def analyze_job(
    config: DictConfig,
    *writers: Callable[[Path], object],
    find_gradients: FindGradients | None = None,
    share: Share | None = None,
) -> Path:
    """Runs `analyze.py`: writes the tables, prints the main ones, and returns their folder.

    The new analysis is written to a temporary folder and replaces the old one atomically at the end. It includes what
    the old one measured on the same runs; an old analysis that has more is kept under another name.

    Args:
        config: The configuration.
        writers: Functions that write further files into the folder before it replaces the old one.
        find_gradients: Computes the gradients before step 1, if the configuration asks for them.
        share: Shares forward passes out to other processes; as for `measure_function_space`.
    """
    checked = parse(AnalyzeConfig, config)
    folder = checked.folder

    def made(before: EarlierAnalysis) -> tuple[dict[str, Any], Callable[[Path], None]]:
        analysis = analyse(checked, before, find_gradients, share)

        def write(new: Path) -> None:
            _write(analysis, new)
            tables = analysis.tables
            show(tables.runs, tables.arm_pairs, tables.arms, tables.tuning, analysis.left_out)
            print(*analysis.missing, sep="\n", end="\n" * bool(analysis.missing))
            for writer in writers:
                writer(new)

        return analysis.facts, write

    write_analysis(folder, made)
    return folder


def _labels(cohort: Cohort) -> dict[str, str]:
    """Returns the labels of the runs and the base; an external adapter is labelled by its name."""
    runs: list[ComparedAdapter | Diverged] = [*cohort.members, *cohort.diverged]
    of_runs = labels({run.name: run.facts.settings for run in runs if run.facts})
    several = len(cohort.bases) > 1
    return of_runs | {base.name: base.name if several else "base" for base in cohort.bases}


def _write(analysis: Analysis, folder: Path) -> None:
    """Writes the tables, then the manifest, with the hash of each table."""
    hashes = {}
    for field in fields(Tables):
        table = getattr(analysis.tables, field.name)
        as_csv = field.name not in ("modules", "run_modules")
        file = folder / f"{field.name}.{'csv' if as_csv else 'parquet'}"
        with atomic_file(file) as temporary:
            table.to_csv(temporary, index=False) if as_csv else table.to_parquet(temporary, index=False)
        hashes[file.name] = hash_file(file)
    facts = {
        **analysis.facts, "left_out": analysis.left_out, "tables": hashes, **provenance.describe_environment(),
    }  # fmt: skip
    write_json(folder / "manifest.json", facts, sealed=True)


def analyse(
    config: AnalyzeConfig,
    before: EarlierAnalysis | None = None,
    find_gradients: FindGradients | None = None,
    share: Share | None = None,
) -> Analysis:
    """Compares all finished runs of the sweeps, and the external adapters.

    Args:
        config: The configuration.
        before: The analysis to replace: the pairs that it measured are measured here, too.
        find_gradients: Computes the gradients before step 1, if the configuration asks for them.
        share: Shares forward passes out to other processes; as for `measure_function_space`.

    Raises:
        InputError: There is nothing to compare, or two adapters cannot be compared.
    """
    require_model_path(config.model_path)
    contents = find_runs(config.output_dir, config.sweeps, config.allow_different)
    locate_bases(contents, config)
    contents.members = at_checkpoint(contents.members, config.checkpoint, config.target_norm, contents.left_out)
    if config.checkpoint != "end":
        score_snapshots(contents.members, config.model_path, trust_of(config), contents.left_out)
    cohort = gather_cohort(contents, config.adapters or {}, external_base(contents, config))
    runs_base = cohort.first.base if cohort.first else None
    require_one_base(config.adapters or {}, runs_base, config.model_path, cohort.left_out)
    names = cohort.names
    reference = find("reference", config.reference, names) if config.reference else default_reference(cohort.members)
    arms = arms_of(cohort)
    named = arm_names(arms, cohort)
    sft = sft_partners(arms, cohort.by_name[reference])
    # A reference named in the configuration is the reference of all runs.
    partners = {} if config.reference else {name: other.name for name, other in sft.items()}
    chosen = choose(names, config.pairs, reference, partners, [pair for arm in arms for pair in repeats(arm)])
    adapters = {member.name: member.sha256 for member in cohort.members}
    previous = [before or EarlierAnalysis(), read_earlier(archive_path(config.folder, adapters))]
    chosen = extended(chosen, names, [pair for analysis in previous for pair in analysis.pairs_among(adapters)])
    benchmark = benchmark_of(cohort, config.primary_benchmark)
    benchmarks = _benchmarks(config.select_on, benchmark, cohort)
    outcomes = outcomes_of(cohort, arms, benchmark)
    family = None if config.holm_family == "all" else _family(arms, cohort.by_name[reference])
    tested = compare_arms(outcomes, family, config.equivalence_margin / 100)
    cache = Cache(config.output_dir / "cache")

    # At most the rank of the runs: an interpolation of two snapshots has further directions, in which they differ.
    top = min(config.num_directions, max(rank for ranks in cohort.ranks.values() for rank in ranks))
    measured, pairs = measure_weight_space(cohort, top, cache)
    tell_composition(cohort, cache)
    based = measure_function_space(config, cohort, chosen, cache, share)
    interventions = intervention_table(config, cohort, chosen.pairs, named, cache)
    # Trajectories are only computed to the ends of the runs.
    arms_at_end = arms if config.checkpoint == "end" else []
    trajectories = measure_trajectories(arms_at_end, sft, cohort.modules, cache, cohort.left_out)
    paths = {name: found.path for name, found in trajectories.items()}
    gradients = Gradients()
    if config.initial_gradients and find_gradients is not None:
        gradients = measure_gradients(cohort, find_gradients(config, cohort))
    tables = weight_tables(
        compared_weights(cohort, measured, pairs, based, paths, gradients, config.num_directions, cache)
    )
    for name in tables.runs.loc[tables.runs["norm"] == 0, "run"]:
        cohort.left_out[f"direction of {name}"] = "its update is 0: training has not changed the weights"
    with tqdm(desc="statistics", total=7, unit="table", leave=False) as bar:
        answers = pair_answers_of(cohort, benchmark, based.copy_answers)
        pair_rows = measured_pair_table(cohort, named, tables.pairs, based, answers)
        bar.update()
        pair_rows = pair_rows.merge(pair_table(cohort, benchmark), on=["run_a", "run_b"])
        seeds = {s.name: s.facts.config.seed if s.facts else math.nan for s in cohort.members}
        of_arms = arm_pairs(pair_rows, seeds, list(dict.fromkeys([*(arm.name() for arm in arms), *named.values()])))
        of_arms = of_arms.merge(tested, on=["arm_a", "arm_b"], how="left")
        of_arms = pd.concat([of_arms, tested[tested["arm_b"] == BASE]], ignore_index=True)
        bar.update()
        layers = measured_layer_table(pair_rows, tables.layers)
        bar.update()
        runs = run_table(cohort, run_function_table(cohort.base_name, tables.runs, based))
        runs.insert(1, "arm", runs["run"].map(named))
        label_of = _labels(cohort)
        runs.insert(2, "label", [label_of.get(run, run) for run in runs["run"]])
        bar.update()
        summary = SummaryTables(runs, of_arms, outcomes, benchmark)
        arm_table = arm_summary_table(arms, cohort.by_name[reference], summary)
        bar.update()
        steps = trajectory_table(arms_at_end, trajectories)
        bar.update()
        factors = factor_table(arms)
        clusters = cluster_table(arms, factors, of_arms)
        classes = class_table(arms_at_end, factors, cohort.modules, cache, cohort.left_out)
        bar.update()
    tuning = Tuning()
    if benchmarks is not None:
        trust = trust_of(config)
        tuning = tune(
            cohort, arms, benchmarks, of_arms, steps, config.equivalence_margin / 100,
            lambda members, left_out: score_snapshots(members, config.model_path, trust, left_out),
        )  # fmt: skip
    plane, kept = mds_table(pair_rows)
    about = {
        arm.name(): {"method": arm.method, "lr": arm.lr, "rank": arm.facts.rank, "model": arm.facts.model}
        for arm in arms
    }
    training = training_table([*cohort.members, *cohort.diverged], cohort.left_out)
    facts = {
        "sweeps": config.sweeps,
        "adapters": adapters,
        "losses": {facts.method: facts.loss for facts in (arm.facts for arm in arms)},
        "bases": [base.name for base in cohort.bases],
        "settings": config.model_dump(mode="json", exclude={"sweep", "output_dir", "logger"}),
        "reference": reference,
        "benchmark": benchmark,
        "holm_family": {"pairs": config.holm_family, "tests": int(of_arms["p_holm"].notna().sum())},
        "measured_pairs": [list(pair) for pair in based.curves],
        "probe_set": based.probe_set,
        "off_task": based.off_task,
        "mds": {"variance_kept": None if math.isnan(kept) else kept},
        "origins": lineage(cohort),
        "points": {s.name: s.run.manifest for s in cohort.members if s.run} if config.checkpoint != "end" else {},
    }
    return Analysis(
        Tables(
            runs=runs, pairs=pair_rows, layers=layers, modules=tables.modules, run_modules=tables.run_modules,
            connectivity=connectivity_table(based.curves), cka=cka_table(based.ckas),
            shifts=shift_table(based.pair_behaviours), arm_pairs=of_arms,
            repeats=repeat_table(pair_rows, seeds, about, {arm.name(): arm.on_any_data for arm in arms}),
            seeds=seed_table(cohort, runs), arms=arm_table, trajectories=steps, training=training,
            mds=plane, factors=factors, clusters=clusters, classes=classes, tuning=tuning.rates,
            tuning_pairs=tuning.pairs, interventions=interventions,
        ),
        cohort,
        facts,
        {**cohort.left_out, **based.left_out},
        tuning.missing,
    )  # fmt: skip


def _benchmarks(select_on: str | None, reported: str | None, cohort: Cohort) -> Benchmarks | None:
    """Returns where rates are chosen and reported, after checking that they differ; None if none are chosen."""
    if select_on is None:
        return None
    if reported is None:
        raise InputError(f"select_on={select_on}: there is no benchmark on which all runs were scored")
    benchmarks = Benchmarks(select_on, reported)
    require_other_problems(cohort, benchmarks)
    return benchmarks


def _family(arms: Sequence[Arm], reference: ComparedAdapter) -> set[frozenset[str]]:
    """Returns the comparisons of `holm_family=reference`: each arm with the base and with SFT or the reference arm."""
    own = next((arm for arm in arms if reference in arm.members), None)
    sft = [arm for arm in arms if arm.method == "sft" and arm.members] or ([own] if own else [])
    rate = reference.facts.learning_rate if reference.facts else None
    with_sft = {(arm.name(), other.name()) for arm in arms if (other := nearest(arm, sft, rate))}
    return {frozenset(pair) for pair in with_sft | {(arm.name(), BASE) for arm in arms} if len(set(pair)) == 2}
