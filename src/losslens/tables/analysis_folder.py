"""Reads the folder of an analysis, and adds tables to it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from losslens.core.errors import InputError, first_line
from losslens.core.files import atomic_file, read_json, read_parquet, write_json
from losslens.core.hashing import hash_file
from losslens.losses.presentation import register_from_manifest


@dataclass(frozen=True)
class AnalysisFolder:
    """The folder of an analysis: its manifest and the tables it contains.

    A table is read only if it is the one whose hash the manifest records; manifests of earlier versions record none.

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

    @cached_property
    def _recorded(self) -> Mapping[str, Any]:
        """The hashes of the tables, by file name; empty if the manifest records none, or is missing."""
        tables = self.manifest.get("tables") if (self.path / "manifest.json").exists() else None
        return tables if isinstance(tables, dict) else {}

    def require_intact(self, file: Path) -> None:
        """Checks that a table is the one that the analysis wrote.

        Raises:
            InputError: Its hash is not the recorded one, it is missing, or it cannot be read.
        """
        recorded = self._recorded.get(file.name)
        try:
            if recorded is None or recorded == hash_file(file):
                return
        except FileNotFoundError as error:
            raise InputError(
                f"{file}: no such file, which the analysis has written; make the analysis again"
            ) from error
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error
        raise InputError(
            f"{file}: damaged, changed by hand, or of another analysis: its hash is not the one in manifest.json; make "
            "the analysis again"
        )

    def add_table(self, name: str, table: pd.DataFrame) -> Path:
        """Writes the table `name`, records its hash in the manifest, and returns its file."""
        file = self.path / f"{name}.csv"
        with atomic_file(file) as temporary:
            table.to_csv(temporary, index=False)
        recorded = {**self._recorded, file.name: hash_file(file)}
        write_json(self.path / "manifest.json", {**self.manifest, "tables": recorded}, sealed=True)
        for known in ("manifest", "_recorded"):
            self.__dict__.pop(known, None)
        return file

    def csv(self, name: str) -> bytes:
        """Returns the bytes of the table `name`; empty if it is missing.

        Raises:
            InputError: It cannot be read, or is not the one that the analysis wrote.
        """
        file = self.path / f"{name}.csv"
        self.require_intact(file)
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
            InputError: The file is not a table with these columns, or not the one that the analysis wrote.
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
            whole = pd.read_csv(
                BytesIO(self.csv(name)), dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""]
            )
            table = whole.reindex(columns=[*texts, *numbers]).astype(dict.fromkeys(numbers, float))
        except pd.errors.EmptyDataError:
            return pd.DataFrame(columns=[*texts, *numbers])
        except ValueError as error:  # not a CSV file, or text in a column of numbers
            raise InputError(f"{file}: not a table of an analysis ({first_line(error)})") from error
        return table.assign(**{column: table[column].astype(object).fillna("") for column in texts})

    def parquet(self, name: str, columns: Sequence[str]) -> pa.Table:
        """Reads those of `columns` that the table `name` has; a missing table has no rows and columns.

        Raises:
            InputError: The file is not readable parquet, or not the one that the analysis wrote.
        """
        file = self.path / f"{name}.parquet"
        self.require_intact(file)
        if not file.exists():
            return pa.table({})
        table = read_parquet(file)
        return table.select([column for column in columns if column in table.column_names])
