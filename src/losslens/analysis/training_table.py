"""Table of the metrics that the runs logged during training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from losslens.analysis.cohort import ComparedAdapter, Diverged
from losslens.core.hashing import hash_file

_PREFIX, _GEOMETRY = "train/", "geometry/"
# A cost, of no use to the analysis. Norms of layers and projections, whose names have a second slash, are left out as
# well.
_NOT_SHOWN = ("geometry/share_of_time",)
_FIRST = ["run", "step", "loss", "grad_norm", "lr"]


def training_table(runs: Iterable[ComparedAdapter | Diverged], left_out: dict[str, str]) -> pd.DataFrame:
    """Builds the table, one row per run and logged step; runs without `metrics.jsonl` have no rows.

    Args:
        runs: The runs, including those that diverged.
        left_out: Receives the runs whose file is damaged, with the reason.
    """
    rows: list[dict[str, Any]] = []
    for member in runs:
        if member.run is None or member.run.folder.parent.name == "snapshots":
            continue
        file = member.run.folder / "metrics.jsonl"
        recorded = member.facts.metrics_sha256 if member.facts else None
        if not file.exists() and recorded is None:
            continue
        try:
            if recorded is not None and hash_file(file) != recorded:
                raise ValueError(f"{file}: does not match the hash recorded in manifest.json")
            rows += [{"run": member.name, **step} for step in _steps(file)]
        except OSError as error:
            left_out[f"training of {member.name}"] = f"{file}: {error.strerror}"
        except ValueError as error:
            left_out[f"training of {member.name}"] = str(error)
    columns = [*_FIRST, *(name for row in rows for name in row)]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(columns)))


def _steps(file: Path) -> list[dict[str, Any]]:
    steps = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            values = json.loads(line)
            step: dict[str, Any] = {"step": int(values["step"])}
            step |= {_column(name): float(value) for name, value in values.items() if _belongs(name)}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{file}: line {number} is not a logged step") from error
        steps.append(step)
    return steps


def _belongs(name: str) -> bool:
    of_whole = name.startswith(_GEOMETRY) and name.count("/") == 1 and name not in _NOT_SHOWN
    return of_whole or name.startswith(_PREFIX)


def _column(name: str) -> str:
    return name.removeprefix(_PREFIX).replace("/", "_")
