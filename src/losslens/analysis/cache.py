"""Cache of measurements: arrays in files named by the hash of everything that determines them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losslens.core.files import atomic_file
from losslens.core.hashing import hash_json

# Incremented when the same inputs give different numbers.
_VERSION = 3

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cache:
    """A folder of cached arrays; it may be deleted at any time.

    Args:
        folder: The folder.
    """

    folder: Path

    def load(self, kind: str, key: Any, names: Iterable[str]) -> Arrays | None:
        """Loads the arrays `names` saved under `key`; None if missing or damaged."""
        try:
            with self._file(kind, key).open("rb") as file, np.load(file, allow_pickle=False) as content:
                return {name: content[name] for name in names}
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def save(self, kind: str, key: Any, arrays: Arrays) -> None:
        """Saves `arrays` under `key`, plain values that determine them completely."""
        with atomic_file(self._file(kind, key)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _file(self, kind: str, key: Any) -> Path:
        return self.folder / kind / f"{hash_json([_VERSION, kind, key], 24)}.npz"
