"""Atomic writing of files and folders, and reading of JSON and parquet with one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError, first_line
from losslens.core.hashing import json_value
from losslens.core.redaction import remove_secrets


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file replaces `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it replaces `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_place(folder: Path) -> None:
    """Checks that a folder can be created or written to, before what goes into it is computed.

    Raises:
        InputError: A part of its path is a file, or its nearest existing parent is not writable.
    """
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{folder}: cannot be created, since {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {place} is not writable")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically and with secrets removed (`redaction`)."""
    text = json.dumps(
        remove_secrets(value), indent=2, ensure_ascii=False, default=lambda entry: remove_secrets(json_value(entry))
    )
    with atomic_file(path) as temporary:
        # A file's name or an error's message may contain a lone surrogate, which UTF-8 cannot encode.
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Writes `text` with secrets removed (`redaction`)."""
    path.write_text(remove_secrets(text), encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: The file does not exist, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise InputError(f"{path}: the JSON is nested too deeply") from error
    except (ValueError, MemoryError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from error


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that contains an object.

    Raises:
        InputError: As for `read_json`, or the value is not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object")
    return value


def read_parquet(path: Path, schema: Any = None, optional: Collection[str] = ()) -> Any:
    """Reads a parquet file as a `pyarrow.Table`.

    Args:
        path: The file.
        schema: A `pyarrow.Schema` of the columns to read and the types to cast them to; None reads all columns as
            they are.
        optional: Columns of `schema` that may be missing from the file, and then from the table.

    Raises:
        InputError: The file does not exist, cannot be read, or does not match the schema.
    """
    import pyarrow.parquet as pq

    try:
        # Not memory-mapped. A damaged file can raise any kind of error in any of these steps.
        table = pq.read_table(path, partitioning=None)
        table.validate(full=True)
        names = table.column_names
        if schema is None:
            return table
        missing = [name for name in schema.names if name not in names]
        required = [name for name in missing if name not in optional]
        if required:
            raise InputError(f"{path}: no column {required[0]!r}")
        for name in missing:
            schema = schema.remove(schema.get_field_index(name))
        return table.select(schema.names).cast(schema)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def read_parquet_metadata(path: Path) -> dict[bytes, bytes]:
    """Reads the metadata of a parquet file without its columns.

    Raises:
        InputError: The file does not exist or cannot be read.
    """
    import pyarrow.parquet as pq

    try:
        return dict(pq.read_schema(path).metadata or {})
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
