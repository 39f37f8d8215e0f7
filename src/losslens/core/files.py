"""Writing so that a reader never sees half a file, and knowing a file by its content."""

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
from losslens.core.redaction import without_secrets


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; it takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically, without secrets (`redaction`)."""
    text = json.dumps(
        without_secrets(value), indent=2, ensure_ascii=False, default=lambda entry: without_secrets(json_value(entry))
    )
    with atomic_file(path) as temporary:
        # Half of a surrogate pair, of a file's name or an error's text, is no UTF-8.
        temporary.write_text(f"{text}\n", encoding="utf-8", errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Writes `text`, without secrets (`redaction`)."""
    path.write_text(without_secrets(text), encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """The value in the JSON file at `path`.

    Raises:
        InputError: There is no such file, it cannot be read, or it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise InputError(f"{path}: not JSON that can be read (nested too deep)") from error
    except (ValueError, MemoryError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)})") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`.

    Raises:
        InputError: As for `read_json`, or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: no JSON object in it")
    return value


def read_parquet(path: Path, schema: Any = None, optional: Collection[str] = ()) -> Any:
    """The table in a parquet file.

    Args:
        path: The file.
        schema: What it must hold, as a `pyarrow.Schema`: these columns are read, and cast; None: all, as they are.
        optional: Names of columns in `schema` that it may lack, and that are then left out.

    Raises:
        InputError: There is no such file, it cannot be read, or it does not hold that.
    """
    import pyarrow.parquet as pq

    try:
        # Not mapped and not trusted: what a damaged file makes of pyarrow is any kind of error, at any of these steps.
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
    """The metadata that a parquet file was written with; its columns are not read.

    Raises:
        InputError: There is no such file, or it cannot be read.
    """
    import pyarrow.parquet as pq

    try:
        return dict(pq.read_schema(path).metadata or {})
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # of a damaged file: any
        raise InputError(f"{path}: not a readable parquet file ({first_line(error)})") from error


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
