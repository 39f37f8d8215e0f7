"""Sizes of an update and the angle between two, from their factors."""

from __future__ import annotations

import numpy as np

from losslens.geometry.deltas import Delta


def inner_product(first: Delta, second: Delta) -> float:
    """⟨ΔW₁, ΔW₂⟩ = s₁·s₂·Σ[(B₁ᵀB₂) ∘ (A₁A₂ᵀ)], Frobenius, in O(d·r²).

    The ranks may differ. Replacing (B, A) by (BG, G⁻¹A) changes nothing.
    """
    return first.scale * second.scale * float(np.sum((first.b.T @ second.b) * (first.a @ second.a.T)))


def singular_values(delta: Delta) -> np.ndarray:
    """The r largest singular values of ΔW, descending; the others are 0.

    With B = Q_b·R_b and Aᵀ = Q_a·R_a they are those of the r×r core s·R_b·R_aᵀ.
    """
    r_b: np.ndarray = np.asarray(np.linalg.qr(delta.b, mode="r"))
    r_a: np.ndarray = np.asarray(np.linalg.qr(delta.a.T, mode="r"))
    return np.linalg.svd(delta.scale * r_b @ r_a.T, compute_uv=False)


def effective_rank(values: np.ndarray) -> float:
    """Exp of the entropy of σ/Σσ (Roy and Vetterli 2007); NaN for an update that is 0."""
    total = values.sum()
    if total == 0:
        return float("nan")
    share = values[values > 0] / total
    return float(np.exp(-np.sum(share * np.log(share))))


def stable_rank(values: np.ndarray) -> float:
    """‖ΔW‖_F²/σ₁²; NaN for an update that is 0."""
    return float(np.sum(values**2) / values[0] ** 2) if values[0] > 0 else float("nan")


def cosine(inner: float, norm: float, other_norm: float) -> float:
    """⟨Δ₁, Δ₂⟩/(‖Δ₁‖·‖Δ₂‖); NaN where one of them is 0, since it has no direction."""
    return inner / (norm * other_norm) if norm > 0 and other_norm > 0 else float("nan")
