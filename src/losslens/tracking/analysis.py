"""Logging of an analysis as a W&B run: its tables, report, figures and curves, and the adapters it used."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from losslens.config.tracking import Logger
from losslens.core.errors import InputError
from losslens.core.redaction import redact
from losslens.runs.run import recorded_adapter_fingerprint, runs_of
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tracking.artifacts import log, use
from losslens.tracking.session import RunInfo, session

_TABLES = ("runs", "arm_pairs", "pairs", "repeats", "seeds", "arms")
_CURVES = (
    ("connectivity", ("alpha", "loss"), "Loss between two runs"),
    ("cka", ("layer", "cka_unbiased"), "CKA of two runs"),
)
# A chart with more lines would be unreadable.
_MAX_LINES = 40


def log_analysis(settings: Logger, folder: Path, output_dir: Path) -> None:
    """Logs the analysis in `folder` as a W&B run; does nothing with `logger=none`.

    Replaces an offline run of an earlier analysis in the same folder that has not been sent yet.

    Args:
        settings: Mode, project and entity.
        folder: Folder of the analysis, with report and figures.
        output_dir: Folder of all sweeps.
    """
    if settings.name == "none":
        return
    analysis = AnalysisFolder(folder)
    manifest = analysis.manifest
    linked = (folder / "wandb").is_symlink()  # what lies there may be another's
    for unsent in () if linked else folder.glob("wandb/offline-run-*"):
        if not any(unsent.glob("*.wandb.synced")):
            shutil.rmtree(unsent)
    sweep = folder.parent.name
    config = {name: manifest[name] for name in ("sweeps", "adapters", "settings", "reference", "benchmark")}
    about = RunInfo(sweep, "analysis", f"{sweep}-{folder.name}", ["analysis"], config)
    with session(settings, output_dir, folder, about) as wandb_session:
        if settings.artifacts:
            for run in [run for name in manifest["sweeps"] for run in runs_of(output_dir, name)]:
                with suppress(InputError):  # a damaged run, which the analysis has left out
                    if run.is_trained() and recorded_adapter_fingerprint(run) in manifest["adapters"].values():
                        use(wandb_session, "adapter", run.name, run.adapter)
        for name in _TABLES:
            if (content := analysis.csv(name)).count(b"\n") > 1:
                wandb_session.run_safely(_log_table, name, content)
        for name, columns, title in _CURVES:
            table = analysis.table(name, ("run_a", "run_b"), columns).replace([math.inf, -math.inf], math.nan).dropna()
            if len(table):
                wandb_session.run_safely(_log_curves, table, name, title, manifest["reference"])
        wandb_session.run_safely(_log_report, folder / "report.html")
        for figure in sorted(folder.glob("figures/*.png")):
            wandb_session.run_safely(_log_figure, figure)
        files = [file for file in folder.rglob("*") if "wandb" not in file.relative_to(folder).parts]
        if settings.artifacts:
            log(wandb_session, "analysis", f"{sweep}-{folder.name}", folder, files)


def _log_table(run: Any, name: str, content: bytes) -> None:
    import wandb

    # W&B's tables accept None, but neither NaN in text columns nor infinity, which is not valid JSON.
    table = pd.read_csv(BytesIO(content)).replace([math.inf, -math.inf], math.nan)
    rows = table.astype(object).where(table.notna(), None).values.tolist()
    run.log({f"tables/{name}": wandb.Table(columns=list(table.columns), data=rows)})


def _log_curves(run: Any, table: pd.DataFrame, name: str, title: str, reference: str) -> None:
    """Logs a chart with one line per pair of runs, pairs with the reference first."""
    import wandb

    x, y = table.columns[2:]
    pairs = list(table.groupby(["run_a", "run_b"], sort=False))
    pairs.sort(key=lambda pair: reference not in pair[0])
    if len(pairs) > _MAX_LINES:
        title += f" ({_MAX_LINES} of {len(pairs)} pairs)"
    shown = pairs[:_MAX_LINES]
    chart = wandb.plot.line_series(
        [rows[x].tolist() for _, rows in shown],
        [rows[y].tolist() for _, rows in shown],
        keys=[f"{a} – {b}" for (a, b), _ in shown],
        title=title,
        xname=x,
    )
    run.log({name: chart})


def _log_report(run: Any, file: Path) -> None:
    import wandb

    run.log({"report": wandb.Html(redact(file.read_text(encoding="utf-8")), inject=False)})


def _log_figure(run: Any, file: Path) -> None:
    import wandb

    run.log({f"figures/{file.stem}": wandb.Image(str(file))})
