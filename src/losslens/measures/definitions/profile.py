"""The profile of an update: how its energy is spread over layers and projections."""

from __future__ import annotations

import numpy as np

from losslens.measures import WeightMeasure
from losslens.measures.definitions.weight_space import ratio
from losslens.measures.views import Array, PairWeights


def profile_distance(pair: PairWeights) -> Array:
    """Computes the total variation distance ½Σ|e_m − e'_m| of the profiles e_m = ‖ΔW_m‖²/‖ΔW‖², in [0, 1].

    Over the modules of a layer it compares the profiles within that layer; of one module it is 0. NaN if an update is
    zero.
    """
    profiles = [ratio(squared, squared.sum(axis=-1, keepdims=True)) for squared in (pair.squared_a, pair.squared_b)]
    distance: Array = np.abs(profiles[0] - profiles[1]).sum(axis=-1) / 2
    return distance


MEASURES = (
    WeightMeasure(
        name="profile_distance", label="profile distance", place=46, tier="more", kind="distance", identical=0.0,
        bounds=(0.0, 1.0), value=profile_distance,
        summary="How much of one update's energy would have to move to other layers or projections to be spread like "
        "the other's: 0 none, 1 all.",
        definition="½Σ\\|e_m − e'_m\\| over modules m (layer × projection), e_m = ‖ΔW_m‖²/‖ΔW‖²; for a layer, between "
        "its projections",
        source="total variation",
    ),
)  # fmt: skip
