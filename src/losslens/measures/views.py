"""Views from which measures are computed: arrays with a module axis, for many runs or pairs at once.

Leading axes (`…`) index runs or pairs; M is the number of modules. Measures reduce the module axis, so the same
function computes a value for all modules, for those of a layer, and for each module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from losslens.measures.answers import PairAnswers
    from losslens.measures.behaviour import PairBehaviour, RunBehaviour
    from losslens.measures.cka import CkaOfPair
    from losslens.measures.connectivity import Curve

Array = NDArray[np.float64]
# Maps the dimensions (space, first subspace, second subspace) of several modules to the expected smallest and largest
# angle of random subspaces, in degrees.
Draw = Callable[[tuple[tuple[int, int, int], ...]], tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class _ByModule:
    # The arrays with a module axis, and the number of axes after it.
    _axes: ClassVar[Mapping[str, int]]

    def _modules(self, index: Callable[[int], tuple[Any, ...]]) -> dict[str, Array]:
        return {name: getattr(self, name)[index(axes)] for name, axes in self._axes.items()}

    def at(self, modules: Sequence[int] | NDArray[np.bool_]) -> Self:
        """Returns the view of some modules."""
        return replace(self, **self._modules(lambda axes: (..., modules, *[slice(None)] * axes)))

    def each(self) -> Self:
        """Returns the view of each module alone: a new leading axis of M, and a module axis of 1."""
        return replace(self, **self._modules(lambda axes: (..., np.newaxis, *[slice(None)] * axes)))


@dataclass(frozen=True, kw_only=True)
class RunWeights(_ByModule):
    """View of runs: their updates and base weights.

    Attributes:
        singular_values: Singular values, descending, NaN past the rank, shape (…, M, r).
        drift: Principal angles (radians, ascending) between the row spaces of A and of the initial A, NaN past the rank
            and where unknown, shape (…, M, r).
        base_norms: ‖W0‖_F, NaN if the base is unknown, shape (…, M).
        left, right, both, concentration, start_mean, start_variance, start_dimension: `PrincipalParts` of each module,
            NaN if the base is unknown, shape (…, M).
        steps: Squared distance ‖ΔW_s − ΔW_{s−1}‖_F² of each snapshot from the one before, the first from 0, NaN without
            snapshots, shape (…, M, S).
        halfway: Overlap beyond chance of the left singular subspaces at half-time and at the end, NaN if unknown, shape
            (…, M).
        effects: `rotated.against_copies` of each module, NaN if not asked for, shape (…, M, 3, 4).
        gradients: Inner products of the gradient step before step 1, the part of it from half of the problems, its sign
            step and ΔW, with each other (`gradients.products_with_end`), NaN if not asked for, shape (…, M, 4, 4).
        directions: k, the number of leading directions of W0, shape (M,).
        outputs: Rows of ΔW, shape (M,).
    """

    _axes: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("singular_values", "drift", "steps"), 1),
        **dict.fromkeys(("effects", "gradients"), 2),
        **dict.fromkeys(("base_norms", "halfway", "left", "right", "both", "concentration"), 0),
        **dict.fromkeys(("start_mean", "start_variance", "start_dimension", "directions", "outputs"), 0),
    }

    singular_values: Array
    drift: Array
    base_norms: Array
    left: Array
    right: Array
    both: Array
    concentration: Array
    start_mean: Array
    start_variance: Array
    start_dimension: Array
    steps: Array
    halfway: Array
    effects: Array
    gradients: Array
    directions: Array
    outputs: Array

    @property
    def squared(self) -> Array:
        """‖ΔW‖_F² of each module, shape (…, M)."""
        squared: Array = np.nansum(self.singular_values**2, axis=-1)
        return squared


@dataclass(frozen=True, kw_only=True)
class PairWeights(_ByModule):
    """View of pairs of updates; `measures.comparison.PairGeometry` defines the products.

    Attributes:
        squared_a: ‖ΔW_a‖_F², shape (…, M).
        squared_b: ‖ΔW_b‖_F², shape (…, M).
        inner: ⟨ΔW_a, ΔW_b⟩, shape (…, M).
        right_overlap: ‖ΔW_a·ΔW_bᵀ‖_F², shape (…, M).
        angles_left: Left principal angles in radians, ascending, NaN past the smaller rank, shape (…, M, k).
        angles_right: The same for the right singular subspaces.
        u1: |⟨u_1, u_1'⟩|, shape (…, M).
        v1: |⟨v_1, v_1'⟩|, shape (…, M).
        gradients: Inner products of the gradient steps of both before step 1 and the parts of them from half of the
            problems, whole and half of the first, then of the second (`gradients.PairGradients`), NaN if not asked for,
            shape (…, M, 4, 4).
        gradient_overlap: ‖G_a·G_bᵀ‖_F² of the gradient steps, NaN if not asked for, shape (…, M).
        outputs: Rows of ΔW, shape (M,).
        inputs: Columns of ΔW, shape (M,).
        widths: Number of leading directions compared, shape (…, M).
        inputs_met: Dimension of the input space that both act on under the null: r if they started from the same A,
            else `inputs`, NaN if unknown; shape (…, M).
        same_a: 1 if both started from the same A, 0 if not, NaN if unknown; shape (…).
        draw: Computes the expected angles of random subspaces.
    """

    _axes: ClassVar[Mapping[str, int]] = {
        **dict.fromkeys(("squared_a", "squared_b", "inner", "right_overlap", "u1", "v1"), 0),
        **dict.fromkeys(("outputs", "inputs", "widths", "inputs_met", "gradient_overlap"), 0),
        **dict.fromkeys(("angles_left", "angles_right"), 1),
        "gradients": 2,
    }

    squared_a: Array
    squared_b: Array
    inner: Array
    right_overlap: Array
    angles_left: Array
    angles_right: Array
    u1: Array
    v1: Array
    gradients: Array
    gradient_overlap: Array
    outputs: Array
    inputs: Array
    widths: Array
    inputs_met: Array
    same_a: Array
    draw: Draw

    def each(self) -> Self:
        """Returns the view of each module alone: a new leading axis of M, and a module axis of 1."""
        return replace(super().each(), same_a=self.same_a[..., np.newaxis])


@dataclass(frozen=True)
class Functions:
    """View of what P pairs of runs do; None for pairs without forward passes, or without answers to the same problems.

    Attributes:
        curves: The loss on the straight path between the two, length P.
        ckas: CKA of their hidden states, length P.
        behaviours: Their outputs and hidden states, compared as shifts from the base, length P.
        answers: Their answers to the problems of the primary benchmark, length P.
    """

    curves: Sequence[Curve | None]
    ckas: Sequence[CkaOfPair | None]
    behaviours: Sequence[PairBehaviour | None]
    answers: Sequence[PairAnswers | None]

    def behaviour(self, value: Callable[[PairBehaviour], float]) -> Array:
        """Returns a value of each pair's behaviour, NaN without forward passes, shape (P,)."""
        return np.array([np.nan if pair is None else value(pair) for pair in self.behaviours], dtype=np.float64)

    def answer(self, value: Callable[[PairAnswers], float]) -> Array:
        """Returns a value of each pair's answers, NaN without answers, shape (P,)."""
        return np.array([np.nan if pair is None else value(pair) for pair in self.answers], dtype=np.float64)


@dataclass(frozen=True)
class RunFunctions:
    """View of forward passes of R runs; None for runs without forward passes.

    Attributes:
        norms: ‖ΔW‖_F, shape (R,).
        behaviours: What each run does, compared with the base, length R.
    """

    norms: Array
    behaviours: Sequence[RunBehaviour | None]

    def behaviour(self, value: Callable[[RunBehaviour], float]) -> Array:
        """Returns a value of each run's behaviour, NaN without forward passes, shape (R,)."""
        return np.array([np.nan if run is None else value(run) for run in self.behaviours], dtype=np.float64)
