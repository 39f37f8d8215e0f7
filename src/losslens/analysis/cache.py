"""Cache of measurements: arrays in files named by the hash of everything that determines them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losslens.core.files import atomic_file
from losslens.core.hashing import hash_json

# Incremented when the same inputs give different numbers.
_VERSION = 3
_KEY = "__key__"  # array with the file's own name, so that it is not read under another
# zipfile verifies a checksum of each array, and raises what its own damaged fields lead to.
_DAMAGED = (
    OSError, ValueError, TypeError, EOFError, KeyError, IndexError, RuntimeError, MemoryError, OverflowError,
    zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Cache:
    """A folder of cached arrays; it may be deleted at any time.

    Args:
        folder: The folder.
    """

    folder: Path

    def load(self, kind: str, key: Any, names: Iterable[str]) -> Arrays | None:
        """Loads the arrays `names` saved under `key`; None if missing, damaged or saved under another key."""
        path = self._file(kind, key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                return {name: content[name] for name in names} if str(content[_KEY]) == path.stem else None
        except _DAMAGED:
            return None

    def save(self, kind: str, key: Any, arrays: Mapping[str, Any]) -> Arrays:
        """Saves `arrays` under `key`, plain values that determine them completely.

        Returns:
            The arrays as `load` will return them. Use these: the order in memory of a slice or a transpose changes the
            last digits of what is computed from it.
        """
        arrays = {name: np.array(value, order="C") for name, value in arrays.items()}
        path = self._file(kind, key)
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{_KEY: np.array(path.stem)})
        return arrays

    def _file(self, kind: str, key: Any) -> Path:
        return self.folder / kind / f"{hash_json([_VERSION, kind, key], 24)}.npz"
