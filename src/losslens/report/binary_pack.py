"""Packs arrays for the page: fixed-point or float32, compressed, as one base64 text."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


class Packed:
    """A header and arrays, each rounded to the digits that the page shows; explorer/packed.js reads them.

    Rounding here, as in the tables, keeps the page from rounding twice and showing a different last digit.
    """

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._header = dict(header)
        self._blocks: list[dict[str, Any]] = []
        self._bytes: list[bytes] = []

    def fixed(self, name: str, values: np.ndarray, digits: int) -> None:
        """Adds an array rounded to `digits` decimals; NaN is kept."""
        scaled = np.round(values.astype(float) * 10.0**digits)
        if np.abs(np.nan_to_num(scaled)).max(initial=0) >= 2**31:
            self.significant(name, values)
            return
        kind = np.dtype("<i2" if np.abs(np.nan_to_num(scaled)).max(initial=0) < 2**15 else "<i4")
        # The smallest integer is read as NaN.
        self._add(name, np.nan_to_num(scaled, nan=np.iinfo(kind).min).astype(kind), digits=digits)

    def significant(self, name: str, values: np.ndarray, digits: int = 4) -> None:
        """Adds an array rounded to `digits` significant digits, at most six; NaN is kept."""
        values = values.astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            places = 10.0 ** (digits - 1 - np.floor(np.log10(np.abs(values))))
            rounded = np.where(values == 0, 0.0, np.round(values * places) / places)
        self._add(name, rounded.astype("<f4"))

    def add_header(self, **header: Any) -> None:
        """Adds entries to the header."""
        self._header |= header

    def text(self) -> str:
        """Returns base64 of gzip of: length of the header (4 bytes), header (JSON), arrays."""
        head = json.dumps({**self._header, "blocks": self._blocks}, allow_nan=False, separators=(",", ":")).encode()
        whole = b"".join([len(head).to_bytes(4, "little"), head, *self._bytes])
        # Without a timestamp, so that the same tables give the same page.
        return base64.b64encode(gzip.compress(whole, compresslevel=6, mtime=0)).decode()

    def _add(self, name: str, values: np.ndarray, **facts: Any) -> None:
        # Byte planes (all first bytes, then all second bytes, ...) compress better.
        planes = values.reshape(-1, 1).view(np.uint8).T
        kind = values.dtype.kind + str(values.dtype.itemsize)
        self._blocks.append({"name": name, "kind": kind, "shape": list(values.shape), **facts})
        self._bytes.append(np.ascontiguousarray(planes).tobytes())
