"""Dense updates ΔW = W − W0, of which nothing but the matrix is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from losslens.updates.base import Array, Update


@dataclass(frozen=True)
class DenseUpdate(Update):
    """Update of any kind, as a matrix.

    Attributes:
        matrix: ΔW, shape (out, in), float64.
    """

    matrix: Array

    @property
    def shape(self) -> tuple[int, int]:
        out, into = self.matrix.shape
        return out, into

    def dense(self) -> Array:
        return self.matrix

    def arrays(self) -> dict[str, Array]:
        return {"matrix": self.matrix}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        return type(self)(np.asarray(arrays["matrix"], dtype=np.float64))

    def __rmul__(self, factor: float) -> Self:
        return type(self)(factor * self.matrix)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.matrix + other.matrix)
