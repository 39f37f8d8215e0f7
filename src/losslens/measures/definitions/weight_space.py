"""Measures of updates from weights alone: size, rank, drift from the initial adapter, and similarity of two updates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from losslens.measures import RunMeasure, WeightMeasure
from losslens.measures.views import Array, PairWeights, RunWeights

_TWO_SIDED_95 = 1.959963984540054


def mean(values: Array) -> Array:
    """Returns the mean over the last axis (modules), ignoring NaN; NaN if all are NaN."""
    known = ~np.isnan(values)
    counts = known.sum(axis=-1)
    return ratio(np.where(known, values, 0.0).sum(axis=-1), counts.astype(np.float64))


def median(values: Array) -> Array:
    """Returns the median over the last axis (modules), ignoring NaN; NaN if all are NaN."""
    medians = np.full(values.shape[:-1], np.nan)
    known = ~np.isnan(values).all(axis=-1)
    if known.any():
        medians[known] = np.nanmedian(values[known], axis=-1)
    return medians


def ratio(numerator: Array, denominator: Array) -> Array:
    """Divides; NaN where the denominator is not above 0."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    quotient: Array = np.divide(numerator, denominator, out=np.full(shape, np.nan), where=np.asarray(denominator) > 0)
    return quotient


# Measures of one run


def norm(run: RunWeights) -> Array:
    """Computes ‖ΔW‖_F over all modules."""
    norms: Array = np.sqrt(run.squared.sum(axis=-1))
    return norms


def relative_norm(run: RunWeights) -> Array:
    """Computes ‖ΔW‖_F/‖W0‖_F over all modules."""
    return ratio(norm(run), np.sqrt(np.sum(run.base_norms**2, axis=-1)))


def effective_rank(values: Array) -> Array:
    """Computes exp of the entropy of σ/Σσ (Roy and Vetterli 2007); NaN for a zero update.

    Args:
        values: Singular values along the last axis, NaN past the rank.
    """
    known = np.nan_to_num(values)
    total = known.sum(axis=-1, keepdims=True)
    share = np.divide(known, total, out=np.zeros_like(known), where=total > 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total[..., 0] > 0, np.exp(-np.sum(share * logs, axis=-1)), np.nan)


def stable_rank(values: Array) -> Array:
    """Computes ‖ΔW‖_F²/σ₁²; NaN for a zero update.

    Args:
        values: Singular values along the last axis, descending, NaN past the rank.
    """
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    return ratio(np.nansum(values**2, axis=-1), values[..., 0] ** 2)


def _smallest(angles: Array) -> Array:
    """Returns the first of ascending angles, in degrees."""
    return np.degrees(angles[..., 0]) if angles.shape[-1] else np.full(angles.shape[:-1], np.nan)


def _largest(angles: Array) -> Array:
    """Returns the last of ascending angles that is not NaN, in degrees."""
    if not angles.shape[-1]:
        return np.full(angles.shape[:-1], np.nan)
    return np.where(np.isnan(angles[..., 0]), np.nan, np.degrees(np.nan_to_num(angles, nan=-1.0).max(axis=-1)))


# Measures of two runs


def cosine(pair: PairWeights) -> Array:
    """Computes Σ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖·‖ΔW_b‖); NaN if one update is zero, which has no direction."""
    return ratio(pair.inner.sum(axis=-1), _norms(pair))


def cosine_null(pair: PairWeights) -> Array:
    """Computes the 95% bound of |cosine| for unrelated updates (1.96 standard deviations, normal approximation).

    With independent Haar singular vectors E⟨ΔW, ΔW'⟩ = 0 and E⟨ΔW, ΔW'⟩² = ‖ΔW‖²‖ΔW'‖²/(out·in) in each module.
    Training moves A little, so runs that share an initial A act on the same inputs whatever their losses. For these the
    right singular vectors are kept and the left ones random: E⟨ΔW, QΔW'⟩² = ‖ΔW·ΔW'ᵀ‖_F²/out for a Haar-random Q.
    The second bound holds whatever the inputs have in common, so it is also used where the initial A is unknown.
    """
    shared_a = pair.right_overlap / pair.outputs
    independent = pair.squared_a * pair.squared_b / (pair.outputs * pair.inputs)
    variance = np.where(pair.same_a == 0, independent.sum(axis=-1), shared_a.sum(axis=-1))
    return ratio(_TWO_SIDED_95 * np.sqrt(variance), _norms(pair))


def _norms(pair: PairWeights) -> Array:
    norms: Array = np.sqrt(pair.squared_a.sum(axis=-1)) * np.sqrt(pair.squared_b.sum(axis=-1))
    return norms


def orthogonal_share(cosines: Array) -> Array:
    """Computes ‖Δ − Π_ref Δ‖/‖Δ‖ = √(1 − cos²): the share of the norm (not energy) orthogonal to the other update."""
    return np.sqrt(np.maximum(0.0, 1 - cosines**2))


def random_agreement(dimensions: Array) -> Array:
    """Computes E|⟨u, u'⟩| = Γ(d/2)/(√π·Γ((d + 1)/2)) of independent unit vectors in ℝᵈ, mean over the last axis."""
    from scipy.special import gammaln  # slow to import, and not needed to show measures

    means: Array = np.mean(np.exp(gammaln(dimensions / 2) - gammaln((dimensions + 1) / 2)) / np.sqrt(np.pi), axis=-1)
    return means


def _agreement_null(side: Literal["left", "right"], pair: PairWeights) -> Array:
    return random_agreement(_dimensions(side, pair))


def _angle(side: Literal["left", "right"], end: Callable[[Array], Array], pair: PairWeights) -> Array:
    return median(end(pair.angles_left if side == "left" else pair.angles_right))


def _angle_null(side: Literal["left", "right"], end: int, pair: PairWeights) -> Array:
    """Computes the expected median over modules, in degrees, of the smallest (0) or largest (1) angle by chance."""
    spaces = np.stack([_dimensions(side, pair), np.broadcast_to(pair.widths, pair.inner.shape)], axis=-1)
    flat = spaces.reshape(-1, *spaces.shape[-2:])
    if not len(flat):
        return np.zeros(spaces.shape[:-2])
    unique, places = np.unique(flat, axis=0, return_inverse=True)
    values = [
        np.nan if np.isnan(sizes).any() else pair.draw(tuple(sorted((int(d), int(k), int(k)) for d, k in sizes)))[end]
        for sizes in unique
    ]
    return np.array(values)[places.reshape(-1)].reshape(spaces.shape[:-2])


def overlap_left(pair: PairWeights) -> Array:
    """Computes the overlap of the top-k left singular subspaces beyond chance, mean over modules; 1 if they coincide.

    ‖UᵀU'‖_F²/k is the mean squared cosine of the principal angles; two random subspaces have k/out. Rescaling by
    (x − k/out)/(1 − k/out) gives 0 on average for unrelated updates. Runs of unequal ranks are compared in as many
    directions as the smaller rank, but each is compared with itself in its own, so √(ρρ') is not a ceiling.
    """
    return mean(beyond_chance(_mean_squared_cosine(pair.angles_left), pair.widths, pair.outputs))


def beyond_chance(squared_cosine: Array, k: Array, dimension: Array) -> Array:
    """Rescales ‖UᵀU'‖_F²/k of two k-dimensional subspaces, so that random ones have 0 on average; NaN if k is all."""
    chance = k / dimension
    return (squared_cosine - chance) / _positive(1 - chance)


def overlap_left_null(pair: PairWeights) -> Array:
    """Computes the 95% bound of |overlap| for random subspaces; see `overlap_bound`."""
    known = ~np.isnan(_mean_squared_cosine(pair.angles_left)) & (pair.widths < pair.outputs)
    return overlap_bound(known, pair.outputs)


def overlap_bound(known: NDArray[np.bool_], outputs: Array) -> Array:
    """Computes the 95% bound of |overlap|, mean over the `known` modules, for random subspaces (normal approximation).

    For Haar-random k-dimensional subspaces of ℝᵈ, Var ‖UᵀU'‖_F² = 2k²(d − k)²/(d²(d − 1)(d + 2)), so the variance of a
    module's overlap is 2/((d − 1)(d + 2)) for any k.
    """
    variance = np.where(known, 2 / np.maximum((outputs - 1) * (outputs + 2), 1), 0.0)
    return ratio(_TWO_SIDED_95 * np.sqrt(variance.sum(axis=-1)), known.sum(axis=-1).astype(np.float64))


def _mean_squared_cosine(angles: Array) -> Array:
    return ratio(np.nansum(np.cos(angles) ** 2, axis=-1), np.sum(~np.isnan(angles), axis=-1).astype(np.float64))


def _positive(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)


def _dimensions(side: Literal["left", "right"], pair: PairWeights) -> Array:
    return np.broadcast_to(pair.outputs if side == "left" else pair.inputs_met, pair.inner.shape).astype(np.float64)


def _angles(side: Literal["left", "right"], end: Literal["min", "max"], place: float, **more: Any) -> WeightMeasure:
    smallest = end == "min"
    return WeightMeasure(
        name=f"angle_{end}_{side}",
        label=f"{'smallest' if smallest else 'largest'} angle, {side}",
        short=f"angle {side}" if smallest else f"largest angle {side}",
        place=place,
        unit="°",
        digits=1,
        kind="level",
        identical=0.0,
        bounds=(0.0, 90.0),
        term="angle",
        value=partial(_angle, side, _smallest if smallest else _largest),
        null=partial(_angle_null, side, 0 if smallest else 1),
        definition=f"{'smallest' if smallest else 'largest'} principal angle between the top-k {side} singular "
        "subspaces, median over modules, degrees; k = `num_directions` = 10, or the smaller of the two ranks",
        source="Björck and Golub 1973; Knyazev and Argentati 2002",
        **more,
    )


def _agreement(name: Literal["u1", "v1"], place: float, **more: Any) -> WeightMeasure:
    symbol, end = ("u₁", "output") if name == "u1" else ("v₁", "input")
    side: Literal["left", "right"] = "left" if name == "u1" else "right"
    return WeightMeasure(
        name=name,
        label=f"agreement of {symbol}",
        short=symbol,
        place=place,
        kind="level",
        identical=1.0,
        term="agreement of u₁, v₁",
        value=lambda pair: mean(getattr(pair, name)),
        null=partial(_agreement_null, side),
        definition=rf"\|⟨{symbol}, {symbol}'⟩\| of the top {side} ({end}) singular vectors, mean over modules",
        source="2606.23740",
        **more,
    )


MEASURES = (
    RunMeasure(
        name="norm", label="‖ΔW‖", place=1, tier="main", value=norm,
        summary="The size of the update: how far the weights have moved, in any direction.",
        definition="‖ΔW‖_F, all modules together",
    ),
    RunMeasure(
        name="relative_norm", label="‖ΔW‖ of ‖W0‖", short="of ‖W0‖", place=2, tier="more", unit="%", digits=1,
        needs_base=True, value=relative_norm, definition="‖ΔW‖_F/‖W0‖_F over the adapted modules",
    ),
    RunMeasure(
        name="effective_rank", label="effective rank", short="eff. rank", place=3, tier="main", digits=1,
        value=lambda run: mean(effective_rank(run.singular_values)),
        summary="How many directions an update effectively uses.",
        definition="exp of the entropy of σ/Σσ, mean over modules", source="Roy and Vetterli 2007",
    ),
    RunMeasure(
        name="stable_rank", label="stable rank", place=4, tier="more", digits=1,
        value=lambda run: mean(stable_rank(run.singular_values)),
        summary="The number of directions relative to the strongest one: 1 if that one carries the whole update.",
        definition="‖ΔW‖_F²/σ₁², mean over modules", source="Rudelson and Vershynin 2007",
    ),
    RunMeasure(
        name="drift_min", label="drift of A, smallest angle", short="least drift of A", place=5, unit="°", digits=1,
        value=lambda run: median(_smallest(run.drift)), term="drift",
        definition="smallest principal angle between the row spaces of A and of the initial A, median over modules, "
        "degrees",
    ),
    RunMeasure(
        name="drift_max", label="drift of A, largest angle", short="drift of A", place=6, tier="more", unit="°",
        digits=1, value=lambda run: median(_largest(run.drift)), term="drift",
        summary="How far LoRA's A has rotated away from the initial A, in degrees.",
        definition="largest principal angle between the row spaces of A and of the initial A, median over modules, "
        "degrees",
    ),
    WeightMeasure(
        name="cosine", label="cosine", place=20, tier="main", kind="similarity", identical=1.0, bounds=(-1.0, 1.0),
        value=cosine, null=cosine_null,
        summary="How far two updates point in the same direction: 1 the same, 0 unrelated, −1 opposite.",
        definition="Σ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖·‖ΔW_b‖)", source="2606.23740",
    ),
    WeightMeasure(
        name="orthogonal_share", label="orthogonal share", place=21, kind="derived", identical=0.0,
        tier="more", derived=orthogonal_share, value=lambda pair: orthogonal_share(cosine(pair)),
        null=lambda pair: orthogonal_share(cosine_null(pair)),
        summary="The share of one update's norm that is orthogonal to the other update.",
        definition="√(1 − cosine²): the share of the norm (not the energy) that is orthogonal to the other run; "
        "symmetric in the two runs", source="2606.23740",
    ),
    _agreement(
        "u1", 30, tier="more", summary="How well two updates agree in the strongest direction they write (u₁) and read "
        "(v₁): 1 the same, 0 unrelated.",
    ),
    _agreement("v1", 31, tier="more"),
    _angles(
        "left", "min", 40, tier="main", summary="The smallest principal angle between the main directions of two "
        "updates, left for what a layer writes, right for what it reads; 0°: they share a direction, 90°: they share "
        "none.",
    ),
    _angles("left", "max", 41),
    _angles("right", "min", 42, tier="main"),
    _angles("right", "max", 43),
    WeightMeasure(
        name="overlap_left", label="subspace overlap, left", short="overlap", place=45, tier="main",
        kind="level", identical=1.0, bounds=(-1.0, 1.0), value=overlap_left, null=overlap_left_null,
        term="overlap", summary="The share of the main directions written by two updates that they have in common: "
        "1 all, 0 no more than chance.",
        definition="(‖UᵀU'‖_F²/k − k/out)/(1 − k/out), U and U' the top-k left singular vectors, mean over modules: "
        "the mean squared cosine of the principal angles, beyond that of random subspaces", source="projection kernel, "
        "Hamm and Lee 2008",
    ),
)  # fmt: skip
