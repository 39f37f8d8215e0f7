"""Atomic writing of files and folders, and reading of JSON and parquet with one-line errors."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError, first_line
from losslens.core.hashing import hash_json, json_value
from losslens.core.redaction import remove_secrets

# Entry of a JSON object with the SHA-256 of the others, so that a flipped bit is not taken for another number.
_SEAL, _SEAL_DIGITS = "content_sha256", 32
# Names that `temporary_name` gives.
_TEMPORARY = re.compile(r"\..+\.(?P<machine>[0-9a-f]{4})-(?P<process>[0-9a-f]+)-[0-9a-f]{4}(?:\.old)?\.tmp")
_DAY = 24 * 3600
_visited: set[tuple[int, Path]] = set()
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; the file replaces `path` if the block ends without an error.

    Raises:
        InputError: There is a folder in its place.
    """
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"{path}: a folder is in the place of this file; delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
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
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.is_symlink() or path.is_file():
            path.unlink()
        try:
            temporary.replace(path)
        except OSError as error:  # asked of the rename: another machine may have made the folder a moment ago
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            _exchange(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(temporary: Path, path: Path) -> None:
    """Puts a new folder into the place of an old one; a disk without room keeps the old one."""
    old = temporary.with_suffix(".old.tmp")
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def temporary_name(path: Path) -> Path:
    """Returns a new name beside `path` for what will replace it: `.NAME.<machine>-<process>-<random>.tmp`.

    The first call of a process for a folder removes the leftovers in it: once, since a cache has very many files.
    """
    if (visit := (os.getpid(), path.parent)) not in _visited:
        _visited.add(visit)
        remove_leftovers(path.parent)
    return path.with_name(f".{path.name}.{_machine()}-{os.getpid():x}-{uuid.uuid4().hex[:4]}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Removes from a folder what processes that were killed on this machine have left under temporary names.

    That of other machines goes when it is a day older than the last change of the folder, by the clock of the file
    system. A file of another name is never touched: the folder may be a user's.
    """
    try:
        changed = folder.stat().st_mtime
        entries = [entry for entry in os.scandir(folder) if entry.name.endswith(".tmp")]
    except OSError:
        return
    for entry in entries:
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None:
            continue
        with suppress(OSError):  # its process ends, or another one removes it
            if found["machine"] == _machine():
                is_left = not _is_alive(int(found["process"], 16))
            else:
                is_left = changed - entry.stat(follow_symlinks=False).st_mtime > _DAY
            if is_left:
                shutil.rmtree(entry.path, ignore_errors=True)
                Path(entry.path).unlink(missing_ok=True)


@cache
def _machine() -> str:
    """Four digits for this machine and its process numbers: containers may share a folder and count from 1 each."""
    try:
        numbers = str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        numbers = ""
    return hash_json([platform.node(), numbers], 4)


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":
        return True  # where os.kill(…, 0) ends a process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


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


def write_json(path: Path, value: Any, *, sealed: bool = False, in_place: bool = False) -> None:
    """Writes `value` as indented JSON, atomically and with secrets removed (`redaction`).

    Args:
        path: The file.
        value: What to write.
        sealed: Adds the hash of the content, an object, which `read_json` verifies.
        in_place: On a full disk, overwrites an existing file where it lies, which needs no space.
    """
    text = _json_text(remove_secrets(value))
    if sealed:
        content = json.loads(text)
        text = _json_text({**content, _SEAL: hash_json(content, _SEAL_DIGITS)})
    # A file's name or an error's message may contain a lone surrogate, which UTF-8 cannot encode.
    encoded = f"{text}\n".encode("utf-8", errors="backslashreplace")
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(encoded)
    except OSError as error:
        allocated = path.stat().st_blocks * 512 if in_place and path.is_file() and not path.is_symlink() else 0
        if error.errno not in _NO_SPACE or len(encoded) > allocated:
            raise
        with path.open("r+b") as file:
            file.write(encoded.ljust(path.stat().st_size, b"\n"))


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=lambda entry: remove_secrets(json_value(entry)))


def remove_link(path: Path) -> None:
    """Removes a symbolic link in the place of a file that is about to be written, which may lead anywhere."""
    if path.is_symlink():
        path.unlink()


def remove_entry(path: Path) -> None:
    """Removes a file, a folder with its content, or a link without what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes `text` with secrets removed (`redaction`)."""
    remove_link(path)
    path.write_text(remove_secrets(text), encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Reads a JSON file, and verifies and removes the hash of its content, if it has one.

    Raises:
        InputError: The file does not exist, cannot be read, is not JSON, or has changed since it was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict) and _SEAL in value:
            recorded = value.pop(_SEAL)
            if recorded != hash_json(value, _SEAL_DIGITS):
                raise InputError(
                    f"{path}: damaged, or changed by hand: its content does not match its {_SEAL} (remove that line if "
                    "the change is meant)"
                )
        return value
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

    if path.is_dir():  # which pyarrow would read as a dataset of several files
        raise InputError(f"{path}: not a readable parquet file (it is a folder)")
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
