"""Gathers the finished runs of one sweep or several into tables: `runs.csv`, `pairs.csv`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
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
from losslens.evaluation import read_outcomes
from losslens.files import atomic_file, write_json
from losslens.geometry.deltas import open_adapter
from losslens.geometry.measures import cosine, effective_rank, inner_product, singular_values, stable_rank
from losslens.models import adapter_sha256
from losslens.runs import Run, runs_of
from losslens.statistics import wilson_interval

RUN_COLUMNS = (
    "run", "method", "lr", "learning_rate", "rank", "model", "seed", "init_seed",
    "norm", "effective_rank", "stable_rank", "benchmark", "accuracy", "n", "ci_low", "ci_high",
)  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """The tables of one analysis.

    Attributes:
        runs: One row a run and benchmark, the base first.
        pairs: One row a pair of trained runs: `run_a`, `run_b`, `cosine`.
        left_out: Runs that are not completed, with their state.
    """

    runs: pd.DataFrame
    pairs: pd.DataFrame
    left_out: dict[str, str]


def analyze_job(config: DictConfig) -> None:
    """What `analyze.py` does: writes the tables and prints them."""
    checked = parse(AnalyzeConfig, config)
    analysis = analyse([run for sweep in checked.sweeps for run in runs_of(checked.output_dir, sweep)])
    folder = checked.output_dir / checked.sweeps[0] / "analysis"
    for name, table in (("runs.csv", analysis.runs), ("pairs.csv", analysis.pairs)):
        with atomic_file(folder / name) as temporary:
            table.to_csv(temporary, index=False)
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


def analyse(runs: Sequence[Run]) -> Analysis:
    """Compares the finished runs among `runs`.

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
    _require_comparable(trained)
    gram, spectra = _geometry(trained)
    norms = np.sqrt(np.diag(gram))

    rows: list[dict[str, Any]] = []
    for run in finished:
        number = trained.index(run) if run in trained else None
        geometry = None if number is None else (float(norms[number]), spectra[number])
        rows += [{"run": names[run], **row} for row in _run_rows(run, geometry)]
    pairs = [
        {"run_a": names[trained[i]], "run_b": names[trained[j]], "cosine": cosine(gram[i, j], norms[i], norms[j])}
        for i, j in combinations(range(len(trained)), 2)
    ]
    whole_numbers = {"rank": "Int64", "seed": "Int64", "init_seed": "Int64", "n": "Int64"}
    return Analysis(
        pd.DataFrame(rows, columns=list(RUN_COLUMNS)).astype(whole_numbers),
        pd.DataFrame(pairs, columns=["run_a", "run_b", "cosine"]),
        left_out,
    )


def _names(runs: Sequence[Run]) -> dict[Run, str]:
    """What each run is called in the tables: its folder, after its sweep's name when there are several sweeps."""
    several = len({run.folder.parent for run in runs}) > 1
    return {run: f"{run.folder.parent.name}/{run.name}" if several else run.name for run in runs}


def _require_comparable(runs: Sequence[Run]) -> None:
    first = runs[0].manifest
    for run in runs:
        if adapter_sha256(run.adapter) != run.status["adapter_sha256"]:
            raise InputError(f"{run.adapter}: not the adapter that was trained (its sha256 is not that of status.json)")
        manifest = run.manifest
        for what, value, other in (
            ("base", manifest["base"], first["base"]),
            ("rollouts", manifest["rollouts"]["sha256"], first["rollouts"]["sha256"]),
        ):
            if value != other:
                raise InputError(f"{run.name}: another {what} than {runs[0].name}; they do not compare")


def _geometry(runs: Sequence[Run]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Inner products of all pairs, shape (runs, runs), and each run's singular values, one array a module."""
    gram = np.zeros((len(runs), len(runs)))
    spectra: list[list[np.ndarray]] = [[] for _ in runs]
    with ExitStack() as stack:
        adapters = [stack.enter_context(open_adapter(run.adapter)) for run in runs]
        modules = adapters[0].modules
        for adapter, run in zip(adapters, runs, strict=True):
            if adapter.modules != modules:
                raise InputError(f"{run.name}: other modules are adapted than in {runs[0].name}; they do not compare")
        for module in tqdm(modules, desc="geometry", unit="module", leave=False, dynamic_ncols=True):
            deltas = [adapter[module] for adapter in adapters]
            for i, delta in enumerate(deltas):
                spectra[i].append(singular_values(delta))
                for j in range(i + 1):
                    gram[i, j] += inner_product(delta, deltas[j])
    return np.tril(gram) + np.tril(gram, -1).T, spectra


def _run_rows(run: Run, geometry: tuple[float, list[np.ndarray]] | None) -> list[dict[str, Any]]:
    manifest = run.manifest
    row: dict[str, Any] = {"method": manifest["method"]}
    if geometry is not None:
        config = manifest["config"]
        norm, spectra = geometry
        row |= {
            "lr": config["lr"]["name"],
            "learning_rate": manifest["learning_rate"],
            "rank": config["lora_rank"]["r"],
            "model": config["model"]["name"],
            "seed": config["seed"],
            "init_seed": config["init_seed"],
            "norm": norm,
            "effective_rank": float(np.mean([effective_rank(values) for values in spectra])),
            "stable_rank": float(np.mean([stable_rank(values) for values in spectra])),
        }
    rows = []
    for file in sorted(run.folder.glob("eval/*.parquet")):
        correct = read_outcomes(file)["correct"]
        low, high = wilson_interval(int(correct.sum()), len(correct))
        score = {"accuracy": float(correct.mean()), "n": len(correct), "ci_low": low, "ci_high": high}
        rows.append({**row, "benchmark": file.stem, **score})
    return rows or [row]


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
