"""Reads single tensors from a safetensors file.

The safetensors library maps the whole file into memory, and every page read stays resident: with many adapters, all
files at once. Here each tensor is read on access and freed when dropped.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import safe_open

from losslens.core.errors import InputError, first_line
from losslens.updates.base import Array

# As the file holds them, little-endian. numpy has no bfloat16: it is the upper half of a float32.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class TensorFile:
    """An open safetensors file, for use in a `with` statement; several threads may read from it.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be read.
        SafetensorError: It is not a complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="np"):
            pass  # the library checks header, bounds and length
        self._file = path.open("rb")
        length = int.from_bytes(self._file.read(8), "little")
        self._header: dict[str, dict[str, Any]] = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._header)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> str:
        """Type of a tensor's values as safetensors names it, such as `BF16`."""
        return str(self._header[name]["dtype"])

    def read(self, name: str, rows: slice | None = None) -> Array:
        """Reads a tensor as float64, which represents all stored values exactly.

        Args:
            name: The tensor.
            rows: Range of its first dimension, from start to stop; all of it by default.

        Raises:
            ValueError: It is not stored as floating-point numbers of 16, 32 or 64 bits.
            OSError: The file was truncated after it was opened.
        """
        entry = self._header[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is stored as {entry['dtype']}, not as 16-, 32- or 64-bit floats")
        first, last = entry["data_offsets"]
        shape = list(entry["shape"])
        if rows is not None:
            if not 0 <= rows.start <= rows.stop <= shape[0]:
                raise ValueError(f"{name} has {shape[0]} rows, not {rows.stop}")
            row = (last - first) // shape[0]
            first, last = first + rows.start * row, first + rows.stop * row
            shape[0] = rows.stop - rows.start
        content = bytearray(last - first)
        if os.preadv(self._file.fileno(), [content], self._start + first) != len(content):
            raise OSError(f"{name} is truncated")
        if not content:
            return np.zeros(shape)
        values = np.frombuffer(content, dtype=_DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            values = (values.astype("<u4") << 16).view("<f4")
        return values.astype(np.float64).reshape(shape)


def read_finite(folder: Path, file: TensorFile, name: str, rows: slice | None = None) -> Array:
    """Reads a tensor as `TensorFile.read` does, and refuses values that are not finite.

    Args:
        folder: The folder of the adapter or model, for messages.
        file: The file.
        name: The tensor.
        rows: Range of its first dimension; all of it by default.

    Raises:
        InputError: It cannot be read, is not stored as floating-point numbers, or a value is not finite.
    """
    try:
        values = file.read(name, rows)
    except (ValueError, OSError) as error:
        raise InputError(f"{folder}: {first_line(error)}") from error
    # A finite sum implies finite terms, and needs no extra array.
    with np.errstate(invalid="ignore", over="ignore"):
        total = values.sum()
    if not math.isfinite(total) and not np.isfinite(values).all():
        raise InputError(f"{folder}: {name} contains non-finite values")
    return values
