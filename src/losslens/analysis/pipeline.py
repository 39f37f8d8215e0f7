"""What `analyze.py` does: gathers, measures what is not known yet, writes every table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from tqdm import tqdm

from losslens.analysis.accuracy import benchmark_of, pair_table, run_table, seed_table
from losslens.analysis.arm_accuracy import BASE, compare_arms, outcomes_of
from losslens.analysis.arm_summary import Tabled, arm_summary_table
from losslens.analysis.arms import Arm, arm_names, arms_of, nearest, repeats, sft_partners
from losslens.analysis.cache import Cache
from losslens.analysis.cohort import Cohort, ComparedAdapter, Diverged, find_runs, gather_cohort
from losslens.analysis.console import show
from losslens.analysis.function_space import measure_function_space, trust_of
from losslens.analysis.lineage import lineage
from losslens.analysis.named_bases import require_one_base
from losslens.analysis.pairs import choose, default_reference, extended, find
from losslens.analysis.repeats import arm_pairs, repeat_table
from losslens.analysis.replacement import Earlier, beside, earlier, kept_aside, missing_from, settle, take_place
from losslens.analysis.snapshots import at_checkpoint, score_snapshots
from losslens.analysis.tables import (
    Tables,
    cka_table,
    compared_weights,
    connectivity_table,
    mds_table,
    measured_layer_table,
    measured_pair_table,
)
from losslens.analysis.training_table import training_table
from losslens.analysis.trajectories import trajectory_table
from losslens.analysis.weight_space import measure_weight_space
from losslens.config.analysis import AnalyzeConfig
from losslens.config.parse import parse
from losslens.core import provenance
from losslens.core.files import atomic_file, write_json
from losslens.measures.tables import weight_tables
from losslens.runs.labels import labels


@dataclass(frozen=True)
class Analysis:
    """The tables, and what the reader must know about them.

    Attributes:
        tables: The tables.
        cohort: What was compared.
        facts: For the manifest: settings, and what the measures were taken on.
        left_out: What was left out: its name, and why.
    """

    tables: Tables
    cohort: Cohort
    facts: dict[str, Any]
    left_out: dict[str, str]


def analyze_job(config: DictConfig, *writers: Callable[[Path], object]) -> Path:
    """What `analyze.py` does first: writes the tables, shows the main ones, and gives their folder.

    The new analysis is written beside the old one and takes its place at the end, as a whole. What the old one has
    measured of the same runs is in the new one; an old one that has more is kept aside.

    Args:
        config: The configuration.
        writers: What else to write into the folder, before it takes the place.
    """
    checked = parse(AnalyzeConfig, config)
    folder = checked.folder
    while True:
        settle(folder)
        before = earlier(folder)
        analysis = analyse(checked, before)
        with beside(folder) as new:
            _write(analysis, new)
            tables = analysis.tables
            show(tables.runs, tables.arm_pairs, tables.arms, analysis.left_out)
            for write in writers:
                write(new)
            missing = missing_from(analysis.facts, before)
            if take_place(new, folder, before, keep=bool(missing)):
                break
        print(f"{folder}: another analysis was written meanwhile; what it measured is taken in", flush=True)
    if missing:
        print(f"{kept_aside(folder, before.adapters)}: the analysis before, kept since this one lacks {missing}")
    return folder


def _labels(cohort: Cohort) -> dict[str, str]:
    """What tells each run from the others, and the base; what was made elsewhere has its name."""
    runs: list[ComparedAdapter | Diverged] = [*cohort.members, *cohort.diverged]
    found = labels({run.name: run.facts.settings for run in runs if run.facts})
    several = len(cohort.bases) > 1
    return found | {base.name: base.name if several else "base" for base in cohort.bases}


def _write(analysis: Analysis, folder: Path) -> None:
    """Writes the tables, and the manifest last."""
    for field in fields(Tables):
        table = getattr(analysis.tables, field.name)
        as_csv = field.name not in ("modules", "run_modules")
        with atomic_file(folder / f"{field.name}.{'csv' if as_csv else 'parquet'}") as temporary:
            table.to_csv(temporary, index=False) if as_csv else table.to_parquet(temporary, index=False)
    write_json(
        folder / "manifest.json", {**analysis.facts, "left_out": analysis.left_out, **provenance.describe_environment()}
    )


def analyse(config: AnalyzeConfig, before: Earlier | None = None) -> Analysis:
    """Compares all finished runs of the sweeps, and the adapters made elsewhere.

    Args:
        config: What is compared, and how.
        before: The analysis that this one takes the place of: the pairs that it measured are measured here, too.

    Raises:
        InputError: There is nothing to compare, or two things do not compare.
    """
    found = find_runs(config.output_dir, config.sweeps, config.allow_different)
    found.members = at_checkpoint(found.members, config.checkpoint, config.target_norm, found.left_out)
    if config.checkpoint != "end":
        score_snapshots(found.members, config.model_path, trust_of(config), found.left_out)
    cohort = gather_cohort(found, config.adapters or {})
    runs_base = cohort.first.base if cohort.first else None
    require_one_base(config.adapters or {}, runs_base, config.model_path, cohort.left_out)
    names = cohort.names
    reference = find("reference", config.reference, names) if config.reference else default_reference(cohort.members)
    arms = arms_of(cohort)
    named = arm_names(arms, cohort)
    sft = sft_partners(arms, cohort.by_name[reference])
    # Who is named as the reference is the reference of all.
    held = {} if config.reference else {name: other.name for name, other in sft.items()}
    chosen = choose(names, config.pairs, reference, held, [pair for arm in arms for pair in repeats(arm)])
    adapters = {member.name: member.sha256 for member in cohort.members}
    places = [before or Earlier(), earlier(kept_aside(config.folder, adapters))]
    chosen = extended(chosen, names, [pair for place in places for pair in place.pairs_among(adapters)])
    benchmark = benchmark_of(cohort, config.primary_benchmark)
    outcomes = outcomes_of(cohort, arms, benchmark)
    tested = compare_arms(outcomes, None if config.holm_family == "all" else _family(arms, cohort.by_name[reference]))
    cache = Cache(config.output_dir / "cache")

    # No further than the runs' own ranks: beyond them lies what two snapshots that were put together differ in.
    top = min(config.num_directions, max(rank for ranks in cohort.ranks.values() for rank in ranks))
    measured, pairs = measure_weight_space(cohort, top, cache)
    based = measure_function_space(config, cohort, chosen, cache)
    tables = weight_tables(compared_weights(cohort, measured, pairs, based.against_base, config.num_directions, cache))
    for name in tables.runs.loc[tables.runs["norm"] == 0, "run"]:
        cohort.left_out[f"direction of {name}"] = "its update is 0: training has not moved the weights"
    with tqdm(desc="statistics", total=6, unit="table", leave=False) as bar:
        pair_rows = measured_pair_table(cohort, named, tables.pairs, based)
        bar.update()
        pair_rows = pair_rows.merge(pair_table(cohort, benchmark), on=["run_a", "run_b"])
        seeds = {s.name: s.facts.config.seed if s.facts else math.nan for s in cohort.members}
        of_arms = arm_pairs(pair_rows, seeds, list(dict.fromkeys([*(arm.name() for arm in arms), *named.values()])))
        of_arms = of_arms.merge(tested, on=["arm_a", "arm_b"], how="left")
        of_arms = pd.concat([of_arms, tested[tested["arm_b"] == BASE]], ignore_index=True)
        bar.update()
        layers = measured_layer_table(pair_rows, tables.layers)
        bar.update()
        runs = run_table(cohort, tables.runs)
        runs.insert(1, "arm", runs["run"].map(named))
        runs.insert(2, "label", runs["run"].map(_labels(cohort)).fillna(runs["run"]))
        bar.update()
        tabled = Tabled(runs, of_arms, outcomes, benchmark)
        arm_table = arm_summary_table(arms, cohort.by_name[reference], tabled)
        bar.update()
        # On the way to a point there is no way to that point.
        ways = arms if config.checkpoint == "end" else []
        trajectories = trajectory_table(ways, sft, cohort.modules, cache, cohort.left_out)
        bar.update()
    plane, kept = mds_table(pair_rows)
    about = {
        arm.name(): {"method": arm.method, "lr": arm.lr, "rank": arm.facts.config.lora_rank.r, "model": arm.facts.model}
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
        "held_out": based.probe_set,
        "mds": {"variance_kept": None if math.isnan(kept) else kept},
        "origins": lineage(cohort),
        "points": {s.name: s.run.manifest for s in cohort.members if s.run} if config.checkpoint != "end" else {},
    }
    return Analysis(
        Tables(
            runs=runs, pairs=pair_rows, layers=layers, modules=tables.modules, run_modules=tables.run_modules,
            connectivity=connectivity_table(based.curves), cka=cka_table(based.ckas), arm_pairs=of_arms,
            repeats=repeat_table(pair_rows, seeds, about, {arm.name(): arm.on_any_data for arm in arms}),
            seeds=seed_table(cohort, runs), arms=arm_table, trajectories=trajectories, training=training,
            mds=plane,
        ),
        cohort,
        facts,
        {**cohort.left_out, **based.left_out},
    )  # fmt: skip


def _family(arms: Sequence[Arm], reference: ComparedAdapter) -> set[frozenset[str]]:
    """The comparisons of `holm_family=reference`: each arm with the base, and with SFT or the reference's arm."""
    own = next((arm for arm in arms if reference in arm.members), None)
    sft = [arm for arm in arms if arm.method == "sft" and arm.members] or ([own] if own else [])
    rate = reference.facts.learning_rate if reference.facts else None
    held = {(arm.name(), other.name()) for arm in arms if (other := nearest(arm, sft, rate))}
    return {frozenset(pair) for pair in held | {(arm.name(), BASE) for arm in arms} if len(set(pair)) == 2}
