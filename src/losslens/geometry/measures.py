"""Sizes and shares of updates, from their singular values and inner products."""

from __future__ import annotations

import numpy as np


def effective_rank(values: np.ndarray) -> float:
    """Exp of the entropy of σ/Σσ (Roy and Vetterli 2007); NaN for an update that is 0."""
    total = values.sum()
    if not total > 0:
        return float("nan")
    share = values[values > 0] / total
    return float(np.exp(-np.sum(share * np.log(share))))


def stable_rank(values: np.ndarray) -> float:
    """‖ΔW‖_F²/σ₁²; NaN for an update that is 0."""
    return float(np.sum(values**2) / values[0] ** 2) if values.size and values[0] > 0 else float("nan")


def cosine(inner: float, norm: float, other_norm: float) -> float:
    """⟨Δ₁, Δ₂⟩/(‖Δ₁‖·‖Δ₂‖); NaN where one of them is 0, since it has no direction."""
    return inner / (norm * other_norm) if norm > 0 and other_norm > 0 else float("nan")


def orthogonal_component(cosine_value: float) -> float:
    """‖Δ − Π_ref Δ‖/‖Δ‖ = √(1 − cos²): the share of an update's norm (not energy) that no multiple of another gives.

    NaN where the cosine is.
    """
    return float(np.sqrt(np.maximum(0.0, 1 - cosine_value**2)))
