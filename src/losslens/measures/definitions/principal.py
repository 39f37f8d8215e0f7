"""Measures of updates against the leading singular directions of W0, each side by itself.

Their null is a 95% bound. The update keeps its singular values and its other side; on the measured side its singular
vectors are a Haar-random frame, of all outputs on the left, of the inputs that its kind was confined to at the start on
the right (LoRA's initial A).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from losslens.measures import RunMeasure
from losslens.measures.definitions.weight_space import ratio
from losslens.measures.nulls import beta_bound, frame_variance
from losslens.measures.views import Array, RunWeights


def principal_left(run: RunWeights) -> Array:
    """Computes Σ‖U_kᵀΔW‖²/Σ‖ΔW‖², U_k the top-k left singular vectors of W0; NaN for a zero update."""
    return ratio(run.left.sum(axis=-1), run.squared.sum(axis=-1))


def principal_left_null(run: RunWeights) -> Array:
    """Computes the 95% bound of `principal_left` for Haar-random left singular vectors; its mean is k/out."""
    mean, single = _of_any_unit_vector(run)
    bound = _bound(run, mean, frame_variance(single, run.outputs, _concentration(run)))
    return np.where(np.isnan(run.left).any(axis=-1), np.nan, bound)  # needs no W0, but is empty without it


def principal_right(run: RunWeights) -> Array:
    """Computes Σ‖ΔW·V_k‖²/Σ‖ΔW‖², V_k the top-k right singular vectors of W0; NaN for a zero update."""
    return ratio(run.right.sum(axis=-1), run.squared.sum(axis=-1))


def principal_right_null(run: RunWeights) -> Array:
    """Computes the 95% bound of `principal_right` for right singular vectors that are random in the initial inputs.

    Its mean is the share of the initial A's own row space: ‖QᵀV_k‖²/r with r orthonormal columns Q. NaN where the
    initial inputs are unknown. The singular values of the initial A are not taken into account.
    """
    variance = frame_variance(run.start_variance, run.start_dimension, _concentration(run))
    return _bound(run, run.start_mean, variance)


def projected_rotation(run: RunWeights) -> Array:
    """Computes √(Σ‖U_kᵀΔW·V_k‖²/Σ(k/out)‖ΔW·V_k‖²): the projected rotation over its root mean square by chance.

    The projected rotation itself is ‖U_kᵀΔW·V_k‖/‖σ_k‖ (2605.10973), σ_k the top-k singular values of W0; it grows with
    the norm of the update, and ‖σ_k‖ cancels in the quotient. NaN if ΔW·V_k is zero.
    """
    mean, _ = _of_any_unit_vector(run)
    return np.sqrt(ratio(run.both.sum(axis=-1), (mean * run.right).sum(axis=-1)))


def projected_rotation_null(run: RunWeights) -> Array:
    """Computes the 95% bound of `projected_rotation` for Haar-random left singular vectors of ΔW·V_k."""
    mean, single = _of_any_unit_vector(run)
    expected = (mean * run.right).sum(axis=-1, keepdims=True)
    weights = ratio(run.right, expected)
    known = np.nan_to_num(run.concentration, nan=1.0)  # a module in which ΔW·V_k is zero has no weight
    variance = (weights**2 * frame_variance(single, run.outputs, known)).sum(axis=-1)
    return np.sqrt(beta_bound((weights * mean).sum(axis=-1), variance, weights.sum(axis=-1)))


def _of_any_unit_vector(run: RunWeights) -> tuple[Array, Array]:
    """Returns mean and variance of ‖U_kᵀu‖² for a random unit vector u: a beta law with k/2 and (out − k)/2."""
    k, out = run.directions, run.outputs
    return k / out, 2 * k * (out - k) / (out**2 * (out + 2))


def _concentration(run: RunWeights) -> Array:
    """Computes Σp², p the shares of the squared singular values of ΔW; 1 for a zero update, which has no weight."""
    fourth = np.nansum(run.singular_values**4, axis=-1)
    return np.where(run.squared > 0, ratio(fourth, run.squared**2), 1.0)


def _bound(run: RunWeights, mean: Array, variance: Array) -> Array:
    """Computes the 95% bound of the share over all modules, from its mean and variance in each."""
    weights = ratio(run.squared, run.squared.sum(axis=-1, keepdims=True))
    return beta_bound((weights * mean).sum(axis=-1), (weights**2 * variance).sum(axis=-1), np.ones(()))


_SIDE: dict[str, Any] = {
    "tier": "more", "unit": "%", "digits": 1, "bounds": (0.0, 1.0), "needs_base": True, "term": "principal share",
}  # fmt: skip

MEASURES = (
    RunMeasure(
        name="principal_left", label="principal share, left", short="principal left", place=7, **_SIDE,
        value=principal_left, null=principal_left_null,
        summary="The share of an update that lies in the strongest directions of the base's weights, left for what a "
        "layer writes, right for what it reads.",
        definition="Σ‖U_kᵀΔW‖²/Σ‖ΔW‖² over modules, U_k the top-k left (output) singular vectors of W0, k = "
        "`num_directions` = 10. The null is the bound that an update with random outputs stays below 95 times in 100; "
        "its mean is k/out",
    ),
    RunMeasure(
        name="principal_right", label="principal share, right", short="principal right", place=8, **_SIDE,
        value=principal_right, null=principal_right_null,
        definition="Σ‖ΔW·V_k‖²/Σ‖ΔW‖² over modules, V_k the top-k right (input) singular vectors of W0. The null is "
        "the same bound for an update with random inputs within the row space of the initial A, orthonormal columns Q; "
        "its mean is that space's own share, ‖QᵀV_k‖²/r",
    ),
    RunMeasure(
        name="projected_rotation", label="projected rotation over chance", short="projected rotation", place=9,
        digits=2, needs_base=True, value=projected_rotation, null=projected_rotation_null,
        definition="√(Σ‖U_kᵀΔW·V_k‖²/Σ(k/out)‖ΔW·V_k‖²) over modules: how much stronger the update maps W0's leading "
        "inputs to its leading outputs than one with random outputs, which has 1 in the root mean square. The null is "
        "the bound of 95 times in 100",
        source="projected rotation ‖U_kᵀΔW·V_k‖/‖σ_k‖ of 2605.10973; ‖σ_k‖ cancels",
    ),
)  # fmt: skip
