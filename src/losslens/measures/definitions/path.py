"""Measures of the path of a run through weight space, from its snapshots: straightness, and how early it settles."""

from __future__ import annotations

import numpy as np

from losslens.measures import RunMeasure
from losslens.measures.definitions.weight_space import mean, norm, overlap_bound, ratio
from losslens.measures.views import Array, RunWeights


def straightness(run: RunWeights) -> Array:
    """Computes ‖ΔW_T‖/Σ‖ΔW_{s+1} − ΔW_s‖, in (0, 1]; NaN without snapshots."""
    return ratio(norm(run), _lengths(run).sum(axis=-1))


def straightness_null(run: RunWeights) -> Array:
    """Computes √Σd²/Σd: the root mean square straightness of a path whose steps have these lengths d, unrelated."""
    lengths = _lengths(run)
    return ratio(np.sqrt(np.sum(lengths**2, axis=-1)), lengths.sum(axis=-1))


def locking(run: RunWeights) -> Array:
    """Computes the overlap beyond chance of the half-time snapshot's top left directions with the end's, by modules."""
    return mean(run.halfway)


def locking_null(run: RunWeights) -> Array:
    """Computes the 95% bound of |locking| for random subspaces, `overlap_left_null`."""
    return overlap_bound(~np.isnan(run.halfway), run.outputs)


def _lengths(run: RunWeights) -> Array:
    """Lengths of the steps over all modules, shape (…, S); 0 past the end."""
    lengths: Array = np.sqrt(np.nansum(run.steps, axis=-2))
    return lengths


MEASURES = (
    RunMeasure(
        name="straightness", label="straightness", place=10, tier="more", digits=2, bounds=(0.0, 1.0), needs_path=True,
        value=straightness, null=straightness_null,
        summary="How direct the way of a run was: the size of its update over the length of the path to it; 1: a "
        "straight line.",
        definition="‖ΔW_T‖/Σ‖ΔW_{s+1} − ΔW_s‖ over the snapshots, from ΔW = 0. It depends on how far apart the "
        "snapshots are. The null is √Σd²/Σd, of steps with the same lengths d in unrelated directions",
        source="2606.07082",
    ),
    RunMeasure(
        name="locking", label="locking of outputs by half-time", short="locking", place=11, digits=2, needs_path=True,
        bounds=(-1.0, 1.0), value=locking, null=locking_null, term="locking",
        summary="How much of the main directions that a run writes in the end it wrote already at half of its steps: 1 "
        "all, 0 no more than chance.",
        definition="(‖U(t)ᵀU(T)‖_F²/K − K/out)/(1 − K/out), U the top-K left singular vectors, K = 4 or the rank, t "
        "the snapshot nearest to half of the steps (within a sixth of them, else empty), mean over modules. The null "
        "is the bound that its absolute value stays below 95 times in 100 for random subspaces",
        source="2606.07082, which takes right vectors and K = 16",
    ),
)  # fmt: skip
