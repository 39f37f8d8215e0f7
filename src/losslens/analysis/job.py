"""What `analyze.py` does: gathers, measures what is not known yet, writes every table."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from pydantic import ValidationError
from tqdm import tqdm

from losslens import provenance
from losslens.analysis.accuracy import benchmark_of, midpoint_columns, pair_table, run_table, seed_table
from losslens.analysis.cache import Cache
from losslens.analysis.console import show
from losslens.analysis.factor_space import geometry
from losslens.analysis.floor_tables import Unrelated, floor_table, shares_initial_adapter, with_seed_floors
from losslens.analysis.on_the_base import CkaOfPair, OnTheBase, TeacherForced
from losslens.analysis.pairs import Chosen, Pair, all_pairs, choose, default_reference, find
from losslens.analysis.subjects import Gathered, gather
from losslens.config import AnalyzeConfig, Data, Evaluation, RolloutConfig, parse
from losslens.errors import InputError
from losslens.files import atomic_file, write_json
from losslens.geometry.connectivity import Curve
from losslens.geometry.floors import random_agreement, random_cosine_bound
from losslens.geometry.tables import AgainstBase, geometry_tables, layer_of
from losslens.models import ModelSource, model_identity
from losslens.rollouts.frozen import load
from losslens.rollouts.sampling import held_out_rollouts

# What a pair's weights are compared by, and what the same method at other seeds is the floor of.
MEASURES = ("cosine", "u1", "v1", "angle_min_left", "angle_max_left", "angle_min_right", "angle_max_right")
SEED_MEASURES = (*MEASURES, "barrier_chord", "barrier_mean", "cka_last", "cka_min")


@dataclass(frozen=True)
class Tables:
    """The tables of one analysis; docs/measures.md says what stands in each column.

    Attributes:
        runs: One row a run and benchmark, the base first.
        pairs: One row a pair of runs.
        layers: One row a pair and layer.
        modules: One row a pair and module.
        run_modules: One row a run and module.
        connectivity: One row a chosen pair and alpha.
        cka: One row a chosen pair (or run and base) and hidden state.
        floors: One row a configuration with several seeds and kind of initial adapter.
        seeds: One row a configuration with several seeds and benchmark.
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame
    run_modules: pd.DataFrame
    connectivity: pd.DataFrame
    cka: pd.DataFrame
    floors: pd.DataFrame
    seeds: pd.DataFrame


@dataclass(frozen=True)
class Analysis:
    """The tables, and what the reader must know about them.

    Attributes:
        tables: The tables.
        gathered: What was compared.
        facts: For the manifest: settings, and what the measures were taken on.
        left_out: What was left out: its name, and why.
    """

    tables: Tables
    gathered: Gathered
    facts: dict[str, Any]
    left_out: dict[str, str]


def analyze_job(config: DictConfig) -> None:
    """What `analyze.py` does: writes the tables and shows the main ones."""
    checked = parse(AnalyzeConfig, config)
    analysis = analyse(checked)
    for field in fields(Tables):
        table = getattr(analysis.tables, field.name)
        as_csv = field.name not in ("modules", "run_modules")
        with atomic_file(checked.folder / f"{field.name}.{'csv' if as_csv else 'parquet'}") as temporary:
            table.to_csv(temporary, index=False) if as_csv else table.to_parquet(temporary, index=False)
    manifest = {**analysis.facts, "left_out": analysis.left_out, **provenance.here()}
    write_json(checked.folder / "manifest.json", manifest)
    show(analysis.tables.runs, analysis.tables.pairs, analysis.tables.floors, analysis.left_out, checked.folder)


def analyse(config: AnalyzeConfig) -> Analysis:
    """Compares all finished runs of the sweeps, and the adapters made elsewhere.

    Raises:
        InputError: There is nothing to compare, or two things do not compare.
    """
    gathered = gather(config.output_dir, config.sweeps, config.adapters or {})
    names = [subject.name for subject in gathered.subjects]
    methods = [subject.manifest.get("method") for subject in gathered.subjects]
    reference = find("reference", config.reference, names) if config.reference else default_reference(names, methods)
    chosen = choose(names, config.pairs, reference)
    benchmark = benchmark_of(gathered, config.benchmark)
    family = [pair for pair in all_pairs(names) if config.family == "all" or reference in pair]
    cache = Cache(config.output_dir / "cache")

    measured, pairs = geometry(gathered, config.top, cache)
    based = _on_the_base(config, gathered, chosen, cache)
    tables = geometry_tables(gathered.modules, measured, pairs, based.against_base)
    unrelated = Unrelated(gathered, measured, config.top, cache)
    with tqdm(desc="statistics", total=4, unit="table", leave=False) as bar:
        pair_rows = _pair_table(gathered, tables.pairs, based, unrelated, benchmark)
        bar.update()
        layers = _layer_table(gathered, tables.layers, unrelated)
        bar.update()
        pair_rows = pair_rows.merge(pair_table(gathered, benchmark, family), on=["run_a", "run_b"])
        bar.update()
        runs = run_table(gathered, tables.runs)
        bar.update()
    facts = {
        "sweeps": config.sweeps,
        "adapters": {subject.name: subject.sha256 for subject in gathered.subjects},
        "bases": list(gathered.bases),
        "settings": config.model_dump(mode="json", exclude={"sweep", "output_dir"}),
        "reference": reference,
        "benchmark": benchmark,
        "holm_family": {"pairs": config.family, "tests": len(family)},
        "measured_pairs": [list(pair) for pair in based.curves],
        "held_out": based.held_out,
    }
    left_out = {**{name: f"{state}, not completed" for name, state in gathered.left_out.items()}, **based.left_out}
    return Analysis(
        Tables(
            runs=runs,
            pairs=pair_rows,
            layers=layers,
            modules=_module_table(gathered, tables.modules),
            run_modules=tables.run_modules,
            connectivity=_connectivity_table(based.curves),
            cka=_cka_table(based.ckas),
            floors=floor_table(gathered, pair_rows, SEED_MEASURES),
            seeds=seed_table(gathered, runs),
        ),
        gathered,
        facts,
        left_out,
    )


def _pair_table(
    gathered: Gathered, geometry_rows: pd.DataFrame, based: _Based, unrelated: Unrelated, benchmark: str | None
) -> pd.DataFrame:
    """What is measured of each pair, and its floors."""
    everywhere = range(len(gathered.modules))
    pairs = list(zip(geometry_rows["run_a"], geometry_rows["run_b"], strict=True))
    beside = [
        {
            "shared_initial": shares_initial_adapter(gathered, pair),
            **unrelated.columns(pair, everywhere, MEASURES),
            **_barrier_columns(based.curves.get(pair)),
            **_cka_columns(based.ckas.get(pair)),
            **midpoint_columns(gathered, pair, benchmark, based.midpoints.get(pair)),
        }
        for pair in pairs
    ]
    table = pd.concat([geometry_rows, pd.DataFrame(beside, index=geometry_rows.index)], axis=1)
    return with_seed_floors(gathered, table, SEED_MEASURES)


def _layer_table(gathered: Gathered, layers: pd.DataFrame, unrelated: Unrelated) -> pd.DataFrame:
    """The layers of each pair, and their floors."""
    numbers = {
        layer: [m for m, module in enumerate(gathered.modules) if layer_of(module) == layer]
        for layer in layers["layer"].unique()
    }
    measures = ("cosine", "angle_min_left")
    pairs = list(zip(layers["run_a"], layers["run_b"], strict=True))
    beside = [
        {
            "shared_initial": shares_initial_adapter(gathered, pair),
            **unrelated.columns(pair, numbers[layer], measures),
        }
        for pair, layer in zip(pairs, layers["layer"], strict=True)
    ]
    table = pd.concat([layers, pd.DataFrame(beside, index=layers.index)], axis=1)
    return with_seed_floors(gathered, table, measures, by=["layer"])


def _module_table(gathered: Gathered, modules: pd.DataFrame) -> pd.DataFrame:
    """The modules of each pair, and what unrelated updates of their shapes would show."""
    shapes = dict(zip(gathered.modules, gathered.shapes, strict=True))
    one = np.ones(1)
    nulls = {
        "cosine_null": {module: random_cosine_bound(one, one, [shape]) for module, shape in shapes.items()},
        "u1_null": {module: random_agreement([out]) for module, (out, _) in shapes.items()},
        "v1_null": {module: random_agreement([into]) for module, (_, into) in shapes.items()},
    }
    return modules.assign(**{name: modules["module"].map(values) for name, values in nulls.items()})


@dataclass(frozen=True)
class _Based:
    """What was measured with the base; empty where it could not be."""

    against_base: dict[str, AgainstBase]
    curves: dict[Pair, Curve]
    ckas: dict[Pair, CkaOfPair]
    midpoints: dict[Pair, pd.Series]
    held_out: dict[str, Any]
    left_out: dict[str, str]


def _on_the_base(config: AnalyzeConfig, gathered: Gathered, chosen: Chosen, cache: Cache) -> _Based:
    """W0, connectivity and CKA. What is missing for them is said, and the rest of the analysis goes on without."""
    left_out = {"connectivity and CKA of other pairs": chosen.left_out} if chosen.left_out else {}
    try:
        source, identity = _base(config, gathered)
        on_the_base = OnTheBase(source, identity, gathered, cache, config.batch_size)
        against_base = on_the_base.against_base(config.top)
    except InputError as error:
        if config.model_path is not None:
            raise
        return _Based(
            {}, {}, {}, {}, {}, {**left_out, "relative norm, off-principal share, connectivity, CKA": str(error)}
        )
    if not chosen.pairs:
        return _Based(against_base, {}, {}, {}, {}, left_out)
    try:
        completions = _held_out(config, gathered)
    except InputError as error:
        if config.held_out.completions is not None:
            raise
        why = f"no held-out completions: {error}; give held_out.completions=FOLDER"
        return _Based(against_base, {}, {}, {}, {}, {**left_out, "connectivity, CKA": why})
    answer_only = TeacherForced(completions.frozen, config.connectivity.loss == "answer")
    curves = on_the_base.curves(chosen.pairs, answer_only, config.connectivity)
    midpoints = {}
    manifest: dict[str, Any] = next((subject.manifest for subject in gathered.subjects if subject.run), {})
    if manifest and config.connectivity.midpoint_problems:
        data = Data(**manifest["config"]["data"])
        problems = min(config.connectivity.midpoint_problems, data.eval)
        midpoints = on_the_base.midpoints(chosen.pairs, problems, data, Evaluation(**manifest["config"]["evaluation"]))
    base_name = next(iter(gathered.bases), "base")
    ckas = on_the_base.ckas(chosen.pairs, base_name, completions, config.cka)
    held_out = {
        "folder": completions.frozen.folder.name,
        "sha256": completions.frozen.sha256,
        "sequences": len(completions.rows),
        "of": len(completions.frozen.table),
        "connectivity_loss": config.connectivity.loss,
        "cka_pooling": config.cka.pooling,
    }
    return _Based(against_base, curves, ckas, midpoints, held_out, left_out)


def _base(config: AnalyzeConfig, gathered: Gathered) -> tuple[ModelSource, dict[str, str | None]]:
    """The base of the runs, where they found it or at `model_path`."""
    manifest: dict[str, Any] = next((subject.manifest for subject in gathered.subjects if subject.run), {})
    model = manifest["config"]["model"] if manifest else {}
    path = config.model_path or model.get("path")
    if path is None:
        raise InputError("no run says what the base is; give model_path=FOLDER")
    field = "model_path" if config.model_path else "model.path"
    revision = model.get("revision") if path == model.get("path") else None
    identity = model_identity(field, path, revision)
    if manifest and identity != manifest["base"]:
        raise InputError(f"{field}={path}: not the base that the runs were trained on; give model_path=FOLDER")
    options = {name: model.get(name, default) for name, default in (("dtype", "auto"), ("device", "auto"))}
    return ModelSource(
        field, path, revision, trust_remote_code=model.get("trust_remote_code", False), **options
    ), identity


def _held_out(config: AnalyzeConfig, gathered: Gathered) -> TeacherForced:
    """The completions that connectivity and CKA are measured on.

    Raises:
        InputError: There are none, or too few are right.
    """
    if config.held_out.completions is not None:
        frozen = load(config.held_out.completions)
    else:
        run = next((subject.manifest for subject in gathered.subjects if subject.run), None)
        if run is None:
            raise InputError("adapters made elsewhere do not say what they were trained on")
        try:
            values = {**run["config"], "output_dir": config.output_dir}
            rollout_config = RolloutConfig(**{name: values[name] for name in RolloutConfig.model_fields})
        except (ValidationError, KeyError) as error:
            raise InputError("the runs' manifest is of another version of LossLens") from error
        frozen = held_out_rollouts(rollout_config, config.held_out.problems)
    completions = TeacherForced(frozen, answer_only=False)
    if len(completions.rows) < 4:
        raise InputError(f"{frozen.folder}: only {len(completions.rows)} completions are right, 4 are needed")
    return completions


def _barrier_columns(curve: Curve | None) -> dict[str, float]:
    values = [*curve.chord, *curve.mean] if curve else [float("nan")] * 6
    names = [f"barrier_{form}{end}" for form in ("chord", "mean") for end in ("", "_low", "_high")]
    return dict(zip(names, values, strict=True))


def _cka_columns(found: CkaOfPair | None) -> dict[str, float]:
    if found is None:
        return {"cka_last": float("nan"), "cka_min": float("nan")}
    return {"cka_last": float(found.unbiased[-1]), "cka_min": float(found.unbiased.min())}


def _connectivity_table(curves: dict[Pair, Curve]) -> pd.DataFrame:
    rows = [
        {"run_a": a, "run_b": b, "alpha": alpha, "loss": loss, "loss_low": low, "loss_high": high}
        for (a, b), curve in curves.items()
        for alpha, loss, low, high in zip(curve.alphas, curve.loss, curve.low, curve.high, strict=True)
    ]
    return pd.DataFrame(rows, columns=["run_a", "run_b", "alpha", "loss", "loss_low", "loss_high"])


def _cka_table(ckas: dict[Pair, CkaOfPair]) -> pd.DataFrame:
    rows = [
        {
            "run_a": a,
            "run_b": b,
            "layer": layer,
            "cka_unbiased": found.unbiased[layer],
            "cka_without_outlier": found.without_outlier[layer],
            "outlier_dimension": found.outliers[layer],
            "n": found.n,
        }
        for (a, b), found in ckas.items()
        for layer in range(len(found.unbiased))
    ]
    columns = ["run_a", "run_b", "layer", "cka_unbiased", "cka_without_outlier", "outlier_dimension", "n"]
    return pd.DataFrame(rows, columns=columns)
