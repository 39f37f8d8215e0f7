"""What measures are computed from: arrays with a module axis, of many runs or pairs at once.

Leading axes (`…`) number runs or pairs; M is the number of modules. What measures sum or average over is the module
axis, so the same function gives a value for all modules, for those of a layer, and for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from losslens.measures.cka import CkaOfPair
    from losslens.measures.connectivity import Curve

Array = NDArray[np.float64]
# The expected smallest and largest angle, in degrees, of random subspaces (space, first, second) of several modules.
Draw = Callable[[tuple[tuple[int, int, int], ...]], tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class _ByModule:
    # The arrays with a module axis, and how many axes they have after it.
    _axes: ClassVar[Mapping[str, int]]

    def _modules(self, index: Callable[[int], tuple[Any, ...]]) -> dict[str, Array]:
        return {name: getattr(self, name)[index(behind)] for name, behind in self._axes.items()}

    def at(self, modules: Sequence[int] | NDArray[np.bool_]) -> Self:
        """The same of some modules."""
        return replace(self, **self._modules(lambda behind: (..., modules, *[slice(None)] * behind)))

    def each(self) -> Self:
        """The same of each module alone: one more leading axis, of M, and then a module axis of 1."""
        return replace(self, **self._modules(lambda behind: (..., np.newaxis, *[slice(None)] * behind)))


@dataclass(frozen=True, kw_only=True)
class RunWeights(_ByModule):
    """Updates and the weights that they are added to.

    Attributes:
        singular_values: Descending, NaN past the rank, shape (…, M, r).
        drift: Principal angles (radians, ascending) between the row spaces of A and of the initial A, NaN past the rank
            and where that is not known, shape (…, M, r).
        base_norms: ‖W0‖_F, NaN where the base is not known, shape (…, M).
        off_principal: `off_principal_share`, NaN where it is not known, shape (…, M).
        off_principal_null: That of a random update, shape (…, M) or (M,).
    """

    _axes: ClassVar[Mapping[str, int]] = {
        "singular_values": 1, "drift": 1, "base_norms": 0, "off_principal": 0, "off_principal_null": 0,
    }  # fmt: skip

    singular_values: Array
    drift: Array
    base_norms: Array
    off_principal: Array
    off_principal_null: Array

    @property
    def squared(self) -> Array:
        """‖ΔW‖_F² of each module, shape (…, M)."""
        squared: Array = np.nansum(self.singular_values**2, axis=-1)
        return squared


@dataclass(frozen=True, kw_only=True)
class PairWeights(_ByModule):
    """Pairs of updates; see `geometry.comparison.PairGeometry` for the products.

    Attributes:
        squared_a: ‖ΔW_a‖_F², shape (…, M).
        squared_b: ‖ΔW_b‖_F², shape (…, M).
        inner: ⟨ΔW_a, ΔW_b⟩, shape (…, M).
        right_overlap: ‖ΔW_a·ΔW_bᵀ‖_F², shape (…, M).
        angles_left: Radians, ascending, NaN past what both have, shape (…, M, k).
        angles_right: The same on the right.
        u1: |⟨u_1, u_1'⟩|, shape (…, M).
        v1: The same on the right.
        outputs: Rows of ΔW, shape (M,).
        inputs: Columns of ΔW, shape (M,).
        widths: How many leading directions of both are compared, shape (…, M).
        inputs_met: Dimensions of the space that both act on whatever they are: r where they started from one A,
            `inputs` else, NaN where that is not known; shape (…, M).
        same_a: Whether they started from one A: 1, 0, or NaN where that is not known; shape (…).
        draw: Angles of random subspaces.
    """

    _axes: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("squared_a", "squared_b", "inner", "right_overlap", "u1", "v1"), 0),
        **dict.fromkeys(("outputs", "inputs", "widths", "inputs_met"), 0),
        **dict.fromkeys(("angles_left", "angles_right"), 1),
    }

    squared_a: Array
    squared_b: Array
    inner: Array
    right_overlap: Array
    angles_left: Array
    angles_right: Array
    u1: Array
    v1: Array
    outputs: Array
    inputs: Array
    widths: Array
    inputs_met: Array
    same_a: Array
    draw: Draw

    def each(self) -> Self:
        """The same of each module alone: one more leading axis, of M, and then a module axis of 1."""
        return replace(super().each(), same_a=self.same_a[..., np.newaxis])


@dataclass(frozen=True)
class Functions:
    """What forward passes showed of each of P pairs; None where none were made.

    Attributes:
        curves: The loss on the straight way between the two, P of them.
        ckas: CKA of their hidden states, P of them.
    """

    curves: Sequence[Curve | None]
    ckas: Sequence[CkaOfPair | None]
