"""What was measured before: arrays in files named after all that decides them, so that nothing is measured twice."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losslens.core.files import atomic_file
from losslens.core.hashing import hash_json

# Raised when the same inputs begin to give other numbers.
_VERSION = 3

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cache:
    """A folder of arrays; it may be deleted at any time.

    Args:
        folder: Where.
    """

    folder: Path

    def load(self, kind: str, key: Any, names: Iterable[str]) -> Arrays | None:
        """The arrays called `names` that were saved under `key`; None when none were, or they are damaged."""
        try:
            with self._file(kind, key).open("rb") as file, np.load(file, allow_pickle=False) as content:
                return {name: content[name] for name in names}
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def save(self, kind: str, key: Any, arrays: Arrays) -> None:
        """Keeps `arrays` under `key`: all that decides them, as plain values."""
        with atomic_file(self._file(kind, key)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _file(self, kind: str, key: Any) -> Path:
        return self.folder / kind / f"{hash_json([_VERSION, kind, key], 24)}.npz"
