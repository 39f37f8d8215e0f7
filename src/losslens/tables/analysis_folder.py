"""Reads the folder of an analysis."""

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
    """The folder of an analysis: its manifest and the tables it contains.

    Attributes:
        path: The folder.
    """

    path: Path

    def __post_init__(self) -> None:
        if (self.path / "manifest.json").exists():
            losses = self.manifest.get("losses")
            for name, entry in losses.items() if isinstance(losses, dict) else ():
                register_from_manifest(str(name), entry)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the analysis.

        Raises:
            InputError: It is missing (the analysis was interrupted) or not a manifest.
        """
        manifest = read_json(self.path / "manifest.json")
        if not isinstance(manifest, dict):
            raise InputError(f"{self.path / 'manifest.json'}: not the manifest of an analysis")
        return manifest

    def csv(self, name: str) -> bytes:
        """Returns the bytes of the table `name`; empty if it is missing."""
        file = self.path / f"{name}.csv"
        try:
            return file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error

    def columns(self, name: str) -> list[str]:
        """Returns the column names of the table `name`; empty if it is missing."""
        first, _, _ = self.csv(name).partition(b"\n")
        return next(csv.reader([first.decode("utf-8", errors="replace").strip()]), [])

    def table(self, name: str, texts: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
        """Reads columns of the table `name`; missing columns are empty, a missing table has no rows.

        Args:
            name: Name of the table.
            texts: Columns read as text; empty cells become empty strings.
            numbers: Columns read as numbers; empty cells become NaN.

        Raises:
            InputError: The file is not a table with these columns.
        """
        key = (name, tuple(texts), tuple(numbers))
        if key not in self._read:
            self._read[key] = self._table(*key)
        return self._read[key].copy()

    @cached_property
    def _read(self) -> dict[tuple[str, tuple[str, ...], tuple[str, ...]], pd.DataFrame]:
        """Tables read so far, since the sections of a report ask for the same columns several times."""
        return {}

    def _table(self, name: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> pd.DataFrame:
        file = self.path / f"{name}.csv"
        try:
            whole = pd.read_csv(file, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])
            table = whole.reindex(columns=[*texts, *numbers]).astype(dict.fromkeys(numbers, float))
        except (FileNotFoundError, pd.errors.EmptyDataError):
            return pd.DataFrame(columns=[*texts, *numbers])
        except (ValueError, OSError) as error:  # not a CSV file, or text in a column of numbers
            raise InputError(f"{file}: not a table of an analysis ({first_line(error)})") from error
        return table.assign(**{column: table[column].astype(object).fillna("") for column in texts})

    def parquet(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Reads those of `columns` that the table `name` has; a missing table has no rows and columns.

        Raises:
            InputError: The file is not readable parquet.
        """
        file = self.path / f"{name}.parquet"
        if not file.exists():
            return pa.table({})
        table = read_parquet(file)
        return table.select([column for column in columns if column in table.column_names])
