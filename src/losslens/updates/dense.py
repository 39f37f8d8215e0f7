"""Dense updates: ΔW of one module as a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from losslens.updates.base import Array, Update


@dataclass(frozen=True)
class DenseUpdate(Update):
    """An update that is kept as its matrix.

    Attributes:
        matrix: ΔW, shape (out, in), float64.
    """

    matrix: Array

    def dense(self) -> Array:
        return self.matrix

    def arrays(self) -> dict[str, Array]:
        return {"weight": self.matrix}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Self:
        return type(self)(arrays["weight"])

    def __rmul__(self, factor: float) -> Self:
        return type(self)(factor * self.matrix)

    def __add__(self, other: Self) -> Self:
        return type(self)(self.matrix + other.matrix)
