"""What was measured before: arrays in files named after all that decides them, so that nothing is measured twice."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from losslens.files import atomic_file, digest

# Raised when the same inputs begin to give other numbers.
_VERSION = 1

Arrays = dict[str, np.ndarray]


class Cache:
    """A folder of arrays; it may be deleted at any time.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, kind: str, key: Any) -> Arrays | None:
        """What was saved under `key`; None when nothing was, or it is damaged."""
        try:
            with np.load(self._file(kind, key), allow_pickle=False) as content:
                return dict(content)
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None

    def save(self, kind: str, key: Any, arrays: Arrays) -> None:
        """Keeps `arrays` under `key`: all that decides them, as plain values."""
        with atomic_file(self._file(kind, key)) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _file(self, kind: str, key: Any) -> Path:
        return self.folder / kind / f"{digest([_VERSION, kind, key], 24)}.npz"
