"""The folder of an analysis, read as it lies on the disk."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from losslens.core.errors import InputError, first_line
from losslens.core.files import read_json, read_parquet
from losslens.losses.presentation import register_from_manifest


@dataclass(frozen=True)
class AnalysisFolder:
    """An analysis: its manifest, and those of its tables that are there.

    Attributes:
        path: The folder.
    """

    path: Path

    def __post_init__(self) -> None:
        if (self.path / "manifest.json").exists():
            losses = self.manifest.get("losses")
            for name, told in losses.items() if isinstance(losses, dict) else ():
                register_from_manifest(str(name), told)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the analysis says of itself.

        Raises:
            InputError: There is none: the analysis was cut off.
        """
        manifest = read_json(self.path / "manifest.json")
        if not isinstance(manifest, dict):
            raise InputError(f"{self.path / 'manifest.json'}: not the manifest of an analysis")
        return manifest

    def csv(self, name: str) -> bytes:
        """The table `name` as it is written; empty where there is none."""
        file = self.path / f"{name}.csv"
        return file.read_bytes() if file.exists() else b""

    def columns(self, name: str) -> list[str]:
        """Names of the columns of the table `name`; none where there is no such table."""
        first, _, _ = self.csv(name).partition(b"\n")
        return next(csv.reader([first.decode("utf-8", errors="replace").strip()]), [])

    def table(self, name: str, texts: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
        """These columns of the table `name`, empty where it lacks them; without rows where there is no such table.

        Args:
            name: Of the table.
            texts: Columns that are never numbers, whatever they look like; what is empty is an empty text.
            numbers: Columns of numbers; what is empty is NaN.

        Raises:
            InputError: It is no table.
        """
        file = self.path / f"{name}.csv"
        try:
            found = pd.read_csv(file, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])
            table = found.reindex(columns=[*texts, *numbers]).astype(dict.fromkeys(numbers, float))
        except (FileNotFoundError, pd.errors.EmptyDataError):
            return pd.DataFrame(columns=[*texts, *numbers])
        except ValueError as error:  # no table at all, or words where numbers should be
            raise InputError(f"{file}: not a table of an analysis ({first_line(error)})") from error
        return table.assign(**{column: table[column].astype(object).fillna("") for column in texts})

    def parquet(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Those of these columns that the table `name` has; without rows or columns where there is no such table.

        Raises:
            InputError: It is no table.
        """
        file = self.path / f"{name}.parquet"
        if not file.exists():
            return pa.table({})
        table = read_parquet(file)
        return table.select([column for column in columns if column in table.column_names])
