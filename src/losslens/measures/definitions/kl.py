"""Measures of one run: KL to the base, absolute, per unit of norm, and against rotated copies of the update."""

from __future__ import annotations

import numpy as np

from losslens.measures import RunFunctionMeasure
from losslens.measures.behaviour import RunBehaviour
from losslens.measures.views import Array, RunFunctions


def _null(run: RunBehaviour) -> float:
    """Returns the mean KL of rotated copies of the same norm; NaN without copies."""
    return float(run.kl_copies.mean()) if run.kl_copies.size else float("nan")


def kl_gain(run: RunBehaviour) -> float:
    """Computes the KL over the mean KL of rotated copies of the same norm; NaN without copies or for a zero update."""
    null = _null(run)
    return run.kl / null if null > 0 else float("nan")


def kl_gain_error(run: RunBehaviour) -> float:
    """Computes the standard error of `kl_gain` from the spread of D draws: gain · sd/(mean·√D); NaN for D < 2."""
    draws = run.kl_copies
    return (
        kl_gain(run) * float(draws.std(ddof=1)) / (_null(run) * len(draws) ** 0.5) if len(draws) > 1 else float("nan")
    )


def kl_per_norm(of: RunFunctions) -> Array:
    """Computes KL/‖ΔW‖², which does not depend on the size of a small update; NaN for a zero update."""
    squared = of.norms**2
    values = of.behaviour(lambda run: run.kl)
    per_norm: Array = np.divide(values, squared, out=np.full(values.shape, np.nan), where=squared > 0)
    return per_norm


MEASURES = (
    RunFunctionMeasure(
        name="kl", label="KL to the base", short="KL", place=16.0, tier="more", unit="nats per token", digits=4,
        value=lambda of: of.behaviour(lambda run: run.kl), null=lambda of: of.behaviour(_null), term="KL",
        summary="How far a run's next-token distributions have moved from the base's on held-out completions.",
        definition="KL(π₀ ‖ π) of the next token at each token of the probe set's completions, mean. The null is the "
        "mean of rotated copies of the same norm", source="2509.04259",
    ),
    RunFunctionMeasure(
        name="kl_q95", label="KL to the base, 95% of tokens", short="KL 95%", place=16.1, unit="nats per token",
        digits=4, value=lambda of: of.behaviour(lambda run: run.kl_quantile), term="KL",
        definition="the 95% quantile over tokens of the same KL: a mean hides that much of it lies in few tokens",
    ),
    RunFunctionMeasure(
        name="kl_per_norm", label="KL per squared norm", short="KL/‖ΔW‖²", place=16.2, digits=5, value=kl_per_norm,
        term="KL gain", definition="KL/‖ΔW‖²; the KL of a small update grows with the square of its size",
    ),
    RunFunctionMeasure(
        name="kl_gain", label="KL gain", place=16.3, tier="more", digits=1,
        value=lambda of: of.behaviour(kl_gain), term="KL gain",
        summary="How much further an update moves the outputs than a random one of the same size, spectrum and inputs.",
        definition="KL over `kl_null`, the mean KL of rotated copies of the same norm; 1: no more than a random update",
    ),
    RunFunctionMeasure(
        name="kl_gain_se", label="KL gain, standard error", short="± KL gain", place=16.4, digits=1,
        value=lambda of: of.behaviour(kl_gain_error), term="KL gain",
        definition="its standard error from the spread of the rotated copies alone",
    ),
)  # fmt: skip
