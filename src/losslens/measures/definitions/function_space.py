"""Measures of two runs that need forward passes: barriers and CKA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from losslens.measures import FunctionMeasure
from losslens.measures.views import Array, Functions

_BARRIER: dict[str, Any] = {
    "kind": "distance", "identical": 0.0, "unit": "nats per token", "digits": 4, "term": "barrier",
}  # fmt: skip
_CKA: dict[str, Any] = {"kind": "similarity", "identical": 1.0, "digits": 4, "term": "CKA"}


def _barrier(form: str, end: int) -> Callable[[Functions], Array]:
    """Returns a function that reads the barrier (`chord` or `mean`): its value (0) or an interval end (1, 2)."""
    return lambda of: np.array([np.nan if curve is None else getattr(curve, form)[end] for curve in of.curves])


def _interval(form: str) -> Callable[[Functions], tuple[Array, Array]]:
    return lambda of: (_barrier(form, 1)(of), _barrier(form, 2)(of))


def cka_last(of: Functions) -> Array:
    """Returns the CKA of the last hidden state."""
    return np.array([np.nan if cka is None else cka.unbiased[-1] for cka in of.ckas])


def cka_min(of: Functions) -> Array:
    """Returns the smallest defined CKA of any hidden state."""
    known = [np.zeros(0) if cka is None else cka.unbiased[~np.isnan(cka.unbiased)] for cka in of.ckas]
    return np.array([values.min() if values.size else np.nan for values in known])


MEASURES = (
    FunctionMeasure(
        name="barrier_chord", label="barrier above the chord", short="barrier", place=50, tier="main", **_BARRIER,
        value=_barrier("chord", 0), interval=_interval("chord"),
        summary="How much the loss rises on the straight path from one trained model to another; 0: they lie in "
        "the same basin.",
        definition="max_α [L(α) − ((1−α)L(0) + αL(1))], never below 0", source="Entezari et al. 2022",
    ),
    FunctionMeasure(
        name="barrier_mean", label="barrier above the mean", place=51, **_BARRIER,
        value=_barrier("mean", 0), interval=_interval("mean"),
        definition="max_α L(α) − (L(0) + L(1))/2, never below half the difference of the endpoints; if "
        "they differ, read it together with the curve", source="Frankle et al. 2020",
    ),
    FunctionMeasure(
        name="cka_last", label="CKA, last layer", short="CKA last", place=60, tier="main", **_CKA, value=cka_last,
        summary="How similar two models' hidden states are on the same texts: 1 the same up to rotation and scale, 0 "
        "unrelated.",
        definition="unbiased linear CKA of the last hidden state", source="Kornblith et al. 2019; Nguyen et al. 2021",
    ),
    FunctionMeasure(
        name="cka_min", label="CKA, smallest of any layer", place=61, **_CKA, value=cka_min,
        definition="unbiased linear CKA, the smallest defined value over all hidden states",
        source="Kornblith et al. 2019; Nguyen et al. 2021",
    ),
)  # fmt: skip
