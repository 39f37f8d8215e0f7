"""Gathers the finished runs of one sweep or several into tables: runs, pairs, layers, modules."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from losslens import provenance
from losslens.config import AnalyzeConfig, parse
from losslens.errors import InputError
from losslens.evaluation import asked_of, read_outcomes
from losslens.files import atomic_file, write_json
from losslens.geometry.comparison import compare_modules
from losslens.geometry.deltas import open_adapter
from losslens.geometry.tables import GeometryTables, geometry_tables
from losslens.runs import Run, runs_of
from losslens.statistics import bootstrap_difference, holm, mcnemar, wilson_interval

RUN_COLUMNS = (
    "run", "method", "lr", "learning_rate", "rank", "model", "seed", "init_seed",
    "norm", "effective_rank", "stable_rank", "benchmark", "accuracy", "n", "ci_low", "ci_high",
)  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """The tables of one analysis; their columns stand in the README.

    Attributes:
        runs: One row a run and benchmark, the base first.
        pairs: One row a pair of trained runs.
        layers: One row a pair and layer.
        modules: One row a pair and module.
        left_out: Runs that are not completed, with their state.
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame
    layers: pd.DataFrame
    modules: pd.DataFrame
    left_out: dict[str, str]


def analyze_job(config: DictConfig) -> None:
    """What `analyze.py` does: writes the tables and prints them."""
    checked = parse(AnalyzeConfig, config)
    analysis = analyse([run for sweep in checked.sweeps for run in runs_of(checked.output_dir, sweep)])
    folder = checked.output_dir / checked.sweeps[0] / "analysis"
    for name, table in (("runs", analysis.runs), ("pairs", analysis.pairs), ("layers", analysis.layers)):
        with atomic_file(folder / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    with atomic_file(folder / "modules.parquet") as temporary:
        analysis.modules.to_parquet(temporary, index=False)
    write_json(
        folder / "manifest.json",
        {
            "sweeps": checked.sweeps,
            "runs": sorted(analysis.runs["run"].unique()),
            "left_out": analysis.left_out,
            **provenance.here(),
        },
    )
    _print(analysis, folder)


def analyse(runs: Sequence[Run], top: int = 10) -> Analysis:
    """Compares the finished runs among `runs`; `top` leading singular directions span the subspaces compared.

    Raises:
        InputError: None is finished, they do not compare (base, rollouts or modules differ), or an adapter is not
            the one that was trained.
    """
    names = _names(runs)
    left_out = {names[run]: run.status["state"] for run in runs if run.status["state"] != "completed"}
    finished = [run for run in runs if names[run] not in left_out]
    trained = [run for run in finished if run.manifest["method"] != "base"]
    if not trained:
        raise InputError(f"no run is completed{f' ({len(left_out)} are not)' if left_out else ''}")
    _require_comparable(finished)
    geometry = _geometry(trained, [names[run] for run in trained], top)
    by_run = geometry.runs.set_index("run")

    rows: list[dict[str, Any]] = []
    for run in finished:
        sizes = dict(by_run.loc[names[run]]) if run in trained else {}
        rows += [{"run": names[run], **row} for row in _run_rows(run, sizes)]
    whole_numbers = {"rank": "Int64", "seed": "Int64", "init_seed": "Int64", "n": "Int64"}
    return Analysis(
        pd.DataFrame(rows, columns=list(RUN_COLUMNS)).astype(whole_numbers),
        geometry.pairs.join(_accuracy_pairs({names[run]: run for run in trained}, geometry.pairs)),
        geometry.layers,
        geometry.modules,
        left_out,
    )


def _names(runs: Sequence[Run]) -> dict[Run, str]:
    """What each run is called in the tables: its folder, after its sweep's name when there are several sweeps."""
    several = len({run.folder.parent for run in runs}) > 1
    return {run: f"{run.folder.parent.name}/{run.name}" if several else run.name for run in runs}


def _require_comparable(runs: Sequence[Run]) -> None:
    """Refuses runs of another base, other rollouts or other problems than the first one's."""
    advice = "they do not compare; put them into different sweeps"
    trained = [run for run in runs if run.manifest["method"] != "base"]
    for run in trained:
        if not run.is_trained():
            raise InputError(f"{run.folder}: no finished adapter in it")
        for what, value, other in (
            ("base", run.manifest["base"], trained[0].manifest["base"]),
            ("rollouts", run.manifest["rollouts"]["sha256"], trained[0].manifest["rollouts"]["sha256"]),
        ):
            if value != other:
                raise InputError(f"{run.name}: another {what} than {trained[0].name}; {advice}")
    asked: dict[str, tuple[str, Run]] = {}
    for run in runs:
        for benchmark in _benchmarks(run):
            this = asked_of(run.evaluation(benchmark))
            first, other_run = asked.setdefault(benchmark, (this, run))
            if this != first:
                raise InputError(
                    f"{run.name}: scored on other problems of {benchmark} than {other_run.name}, or decoded otherwise; "
                    "score both with the same data and evaluation settings"
                )


def _geometry(runs: Sequence[Run], names: Sequence[str], top: int) -> GeometryTables:
    with ExitStack() as stack:
        adapters = [stack.enter_context(open_adapter(run.adapter)) for run in runs]
        modules = adapters[0].modules
        for adapter, name in zip(adapters, names, strict=True):
            if adapter.modules != modules:
                raise InputError(f"{name}: other modules are adapted than in {names[0]}; they do not compare")
        bar = tqdm(modules, desc="geometry", unit="module", leave=False, dynamic_ncols=True)
        return geometry_tables(list(compare_modules(adapters, bar, top)), names)


def _run_rows(run: Run, sizes: dict[str, float]) -> list[dict[str, Any]]:
    manifest = run.manifest
    row: dict[str, Any] = {"method": manifest["method"]}
    if sizes:
        config = manifest["config"]
        row |= {
            "lr": config["lr"]["name"],
            "learning_rate": manifest["learning_rate"],
            "rank": config["lora_rank"]["r"],
            "model": config["model"]["name"],
            "seed": config["seed"],
            "init_seed": config["init_seed"],
            **sizes,
        }
    rows = []
    for benchmark in _benchmarks(run):
        correct = read_outcomes(run.evaluation(benchmark))["correct"]
        low, high = wilson_interval(int(correct.sum()), len(correct))
        score = {"accuracy": float(correct.mean()), "n": len(correct), "ci_low": low, "ci_high": high}
        rows.append({**row, "benchmark": benchmark, **score})
    return rows or [row]


def _benchmarks(run: Run) -> list[str]:
    return sorted(file.stem for file in run.folder.glob("eval/*.parquet"))


def _accuracy_pairs(runs: dict[str, Run], pairs: pd.DataFrame) -> pd.DataFrame:
    """The columns of `pairs.csv` that compare accuracies on the benchmark of the runs' own data.

    Holm's correction takes all pairs of the table as its family.
    """
    benchmark = next(iter(runs.values())).manifest["config"]["data"]["name"]
    outcomes = {
        name: read_outcomes(run.evaluation(benchmark)).groupby("problem_id")["correct"].mean()
        for name, run in runs.items()
        if benchmark in _benchmarks(run)
    }
    rows = []
    for a, b in zip(pairs["run_a"], pairs["run_b"], strict=True):
        if a not in outcomes or b not in outcomes or set(outcomes[a].index) != set(outcomes[b].index):
            raise InputError(f"{a} and {b}: not scored on the same problems of {benchmark}; they do not compare")
        first, second = outcomes[a].to_numpy(), outcomes[b].reindex(outcomes[a].index).to_numpy()
        test = mcnemar(first > 0.5, second > 0.5)
        low, high = bootstrap_difference(first, second)
        rows.append(
            {
                "mcnemar_b": test.b,
                "mcnemar_c": test.c,
                "mcnemar_p": test.p,
                "mcnemar_midp": test.mid_p,
                "accuracy_diff": float((first - second).mean()),
                "diff_low": low,
                "diff_high": high,
            }
        )
    columns = pd.DataFrame(rows, index=pairs.index)
    return columns.assign(p_holm=holm(columns["mcnemar_p"])) if rows else columns


def _print(analysis: Analysis, folder: Path) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(analysis.runs["run"]))}
    table = Table("", Column("run", overflow="fold"), "benchmark", "accuracy", "95% interval", "‖ΔW‖", "eff. rank")
    for _, row in analysis.runs.iterrows():
        table.add_row(
            str(numbers[row["run"]]),
            row["run"],
            row["benchmark"],
            _percent(row["accuracy"]),
            f"{_percent(row['ci_low'])} … {_percent(row['ci_high'])}",
            _number(row["norm"]),
            _number(row["effective_rank"], 1),
        )
    console.print(table)
    trained = analysis.runs[analysis.runs["method"] != "base"].drop_duplicates("run")
    cosines = {frozenset((pair.run_a, pair.run_b)): pair.cosine for pair in analysis.pairs.itertuples()}
    matrix = Table("cosine of ΔW", *(str(numbers[name]) for name in trained["run"]))
    for name, method in zip(trained["run"], trained["method"], strict=True):
        cells = [_number(cosines.get(frozenset((name, other)), 1.0)) for other in trained["run"]]
        matrix.add_row(f"{numbers[name]} {method}", *cells)
    console.print(matrix)
    for name, state in analysis.left_out.items():
        print(f"left out, {state}: {name}")
    print(folder)


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1%}"


def _number(value: float, digits: int = 3) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}"
