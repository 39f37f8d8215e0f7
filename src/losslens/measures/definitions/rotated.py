"""Measures of what an update does to its base weights, as ratios to left-rotated copies of the same update.

They are empty unless `spectrum_copies` asks for them. Their null is a 95% bound for a further copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from losslens.measures import RunMeasure
from losslens.measures.definitions.weight_space import ratio
from losslens.measures.views import Array, RunWeights

_SPECTRUM, _ROTATION, _UNCHANGED = range(3)


def over_copies(effect: int, power: float, run: RunWeights) -> Array:
    """Computes (Σe/Σē)^`power` over modules, e an effect of the update and ē its mean over the copies."""
    of_run, mean = run.effects[..., effect, 0], run.effects[..., effect, 1]
    ratios: Array = ratio(of_run.sum(axis=-1), mean.sum(axis=-1)) ** power
    return ratios


def over_copies_null(effect: int, power: float, run: RunWeights) -> Array:
    """Computes the 95% bound of `over_copies` for a further copy.

    Student's t, with the variance of a copy and of the mean of the others, and the degrees of freedom of a sum of
    unequal variances (Welch and Satterthwaite).
    """
    from scipy.special import stdtrit  # slow to import, and not needed to show measures

    _, mean, variance, copies = np.moveaxis(run.effects[..., effect, :], -1, 0)
    number = np.where(copies > 0, copies, np.nan)
    squared = variance * (1 + 1 / number)
    spread = np.nansum(squared, axis=-1)
    degrees = ratio(spread**2, np.nansum(squared**2 / (number - 1), axis=-1))
    total = mean.sum(axis=-1)
    margin = np.where(spread > 0, stdtrit(degrees, 0.95) * np.sqrt(spread), 0.0)  # copies may be all alike
    bound: Array = ratio(total + margin, total) ** power
    return bound


def _measure(name: str, effect: int, power: float, **about: Any) -> RunMeasure:
    return RunMeasure(
        name=name,
        digits=2,
        needs_base=True,
        term="left-rotated copy",
        value=partial(over_copies, effect, power),
        null=partial(over_copies_null, effect, power),
        **about,
    )


_BOUND = "The null is the bound that a further copy stays below 95 times in 100"

MEASURES = (
    _measure(
        "nss_ratio", _SPECTRUM, 0.5, label="shift of W0's spectrum over that of copies", short="NSS ratio", place=12,
        summary="An update with its outputs turned at random: it keeps the norm, the spectrum and the inputs, and "
        "shows what these alone do to the base.",
        definition="√(Σ‖σ(W0 + ΔW) − σ(W0)‖²/Σ of left-rotated copies, in the mean) over modules, σ the top-k singular "
        f"values: the normalised spectral shift relative to its null. {_BOUND}",
        source="NSS of 2511.08567",
    ),
    _measure(
        "rotation_ratio", _ROTATION, 0.5, label="rotation of W0's directions over that of copies",
        short="rotation ratio", place=13,
        definition="√(ΣΣθ²/ΣΣ of left-rotated copies, in the mean) over modules, θ the principal angles between the "
        f"top-k left singular subspaces of W0 + ΔW and W0. {_BOUND}",
        source="2511.08567, 2606.07082",
    ),
    _measure(
        "unchanged_ratio", _UNCHANGED, 1.0, label="unchanged entries over those of copies", short="unchanged ratio",
        place=14,
        definition="number of entries with \\|ŵ − w\\| ≤ 10⁻³·max(\\|w\\|, \\|ŵ\\|) over that of left-rotated copies, "
        f"in the mean: bf16 sparsity relative to its null. {_BOUND}",
        source="2511.08567",
    ),
)  # fmt: skip
