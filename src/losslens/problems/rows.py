"""Reading of rows from a user's parquet, JSON Lines or CSV file."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError, first_line


def read_rows(file: Path, csv: bool = False) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Reads the column names of a file, and its rows with their numbers from 1 (in JSON Lines, line numbers).

    Args:
        file: Parquet or JSON Lines, with any extension.
        csv: Reads files with the extension `.csv` as CSV with a header; all cells are strings.

    Raises:
        InputError: The file cannot be read or contains no rows.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or first_line(error)}") from error
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{file}: not a readable gzip file ({first_line(error)})") from error
    if content.startswith(b"PAR1") or file.suffix.lower() in (".parquet", ".pq"):
        rows = _parquet(file, content)
    elif csv and file.suffix.lower() == ".csv":
        rows = _csv(file, content)
    else:
        rows = _json_lines(file, content)
    if not rows:
        raise InputError(f"{file}: contains no rows")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    return names, iter(rows)


def _parquet(file: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(enumerate(pq.read_table(pa.BufferReader(content)).to_pylist(), 1))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: not a readable parquet file ({first_line(error)})") from error


# Other formats, by their first bytes.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ": "compressed with xz",
    b"BZh": "compressed with bzip2",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"SQLite format 3": "an SQLite database",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself (run git lfs pull)",
}


def _decoded(file: Path, content: bytes) -> str:
    for start, what in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise InputError(f"{file}: {what}; only parquet and JSON Lines are supported")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        why = f"line {line}: {error.reason}" if encoding == "utf-8-sig" else error.reason
        raise InputError(f"{file}: neither parquet nor UTF-8 text ({why})") from error


def _csv(file: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    import csv
    import io

    try:
        rows: list[dict[Any, Any]] = list(csv.DictReader(io.StringIO(_decoded(file, content), newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"{file}: not readable as CSV ({first_line(error)})") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise InputError(f"{file}: row {number}: the number of cells differs from the number of columns")
    return list(enumerate(rows, 1))


def _json_lines(file: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    rows: list[tuple[int, dict[str, Any]]] = []
    # Not `splitlines`, which also splits at separators that JSON allows inside strings.
    lines = _decoded(file, content).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for huge numbers or deep nesting
            raise InputError(f"{file}: {_not_json(number, line, not rows, error)}") from error
        if isinstance(row, list) and not rows and all(isinstance(entry, dict) for entry in row):
            raise InputError(f"{file}: a JSON array; write one object per line (JSON Lines)")
        if not isinstance(row, dict):
            raise InputError(f"{file}: row {number}: not a JSON object with the columns as keys")
        rows.append((number, row))
    return rows


def _not_json(number: int, line: str, is_first: bool, error: Exception) -> str:
    start = line.strip()
    if is_first and start.startswith("[") and not isinstance(error, RecursionError):
        return "a JSON array; write one object per line (JSON Lines)"
    if (is_first and start in ("{", "{}")) or (is_first and re.fullmatch(r'\{\s*"[^"]*"\s*:.*,', start)):
        return "a JSON object on several lines; write one object per line (JSON Lines)"
    if is_first and start[0] not in "{[":
        return f"row {number}: not JSON, but {start[:40]!r}; only parquet and JSON Lines are supported (no CSV)"
    return f"row {number}: not JSON ({first_line(error)})"
