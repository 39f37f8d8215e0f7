"""SHA-256 hashes of files, folders, texts and JSON values, in hexadecimal digits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any


def hash_file(path: Path) -> str:
    """Computes the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, patterns: tuple[str, ...]) -> str:
    """Computes the SHA-256 of the names and contents of the files directly in `folder` that match a pattern."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    return hash_json({file.name: hash_file(file) for file in files}, 64)


def hash_json(value: Any, length: int) -> str:
    """Computes the first `length` hexadecimal digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=json_value)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def hash_text(text: str) -> str:
    """Computes the SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def json_value(value: Any) -> Any:
    """Converts a dataclass to a dict and a path to a string; the `default` of `json.dumps`.

    Raises:
        TypeError: `value` is neither.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    # The `str` of other objects may contain a memory address, so its hash would not be reproducible.
    raise TypeError(f"{type(value).__name__} is not JSON-serialisable")
