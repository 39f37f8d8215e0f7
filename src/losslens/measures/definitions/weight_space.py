"""Measures of updates alone: how large, how concentrated, how far from the start, and how near to another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from losslens.measures import RunMeasure, WeightMeasure
from losslens.measures.views import Array, PairWeights, RunWeights

_TWO_SIDED_95 = 1.959963984540054


def mean(values: Array) -> Array:
    """Mean over the modules (the last axis) that have a value; NaN where none has."""
    known = ~np.isnan(values)
    counts = known.sum(axis=-1)
    return _ratio(np.where(known, values, 0.0).sum(axis=-1), counts.astype(np.float64))


def median(values: Array) -> Array:
    """Median over the modules (the last axis) that have a value; NaN where none has."""
    found = np.full(values.shape[:-1], np.nan)
    known = ~np.isnan(values).all(axis=-1)
    if known.any():
        found[known] = np.nanmedian(values[known], axis=-1)
    return found


def _ratio(numerator: Array, denominator: Array) -> Array:
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=np.asarray(denominator) > 0)


# Of one run


def norm(run: RunWeights) -> Array:
    """‖ΔW‖_F over the modules."""
    return np.sqrt(run.squared.sum(axis=-1))


def relative_norm(run: RunWeights) -> Array:
    """‖ΔW‖_F/‖W0‖_F over the modules."""
    return _ratio(norm(run), np.sqrt(np.sum(run.base_norms**2, axis=-1)))


def effective_rank(values: Array) -> Array:
    """Exp of the entropy of σ/Σσ (Roy and Vetterli 2007); NaN for an update that is 0.

    Args:
        values: Singular values along the last axis, NaN past the rank.
    """
    known = np.nan_to_num(values)
    total = known.sum(axis=-1, keepdims=True)
    share = np.divide(known, total, out=np.zeros_like(known), where=total > 0)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return np.where(total[..., 0] > 0, np.exp(-np.sum(share * logs, axis=-1)), np.nan)


def stable_rank(values: Array) -> Array:
    """‖ΔW‖_F²/σ₁²; NaN for an update that is 0.

    Args:
        values: Singular values along the last axis, descending, NaN past the rank.
    """
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    return _ratio(np.nansum(values**2, axis=-1), values[..., 0] ** 2)


def _smallest(angles: Array) -> Array:
    """The first of ascending angles, in degrees."""
    return np.degrees(angles[..., 0]) if angles.shape[-1] else np.full(angles.shape[:-1], np.nan)


def _largest(angles: Array) -> Array:
    """The last of ascending angles that is there, in degrees."""
    if not angles.shape[-1]:
        return np.full(angles.shape[:-1], np.nan)
    return np.where(np.isnan(angles[..., 0]), np.nan, np.degrees(np.nan_to_num(angles, nan=-1.0).max(axis=-1)))


def off_principal(run: RunWeights) -> Array:
    """The share of ‖ΔW‖² over the modules that lies outside W0's principal subspaces."""
    return _ratio(np.nansum(run.off_principal * run.squared, axis=-1), run.squared.sum(axis=-1)) + _unknown(run)


def off_principal_null(run: RunWeights) -> Array:
    """That of a random update with this one's norms: 1 − k²/(out·in) of each module."""
    shares = _ratio(np.sum(run.off_principal_null * run.squared, axis=-1), run.squared.sum(axis=-1))
    return shares + _unknown(run)


def _unknown(run: RunWeights) -> Array:
    """NaN where nothing is known of W0, 0 elsewhere."""
    return np.where(np.isnan(run.off_principal).all(axis=-1), np.nan, 0.0)


# Of two runs


def cosine(pair: PairWeights) -> Array:
    """Σ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖·‖ΔW_b‖); NaN where one of them is 0, since it has no direction."""
    return _ratio(pair.inner.sum(axis=-1), _norms(pair))


def cosine_null(pair: PairWeights) -> Array:
    """The bound that |cosine| stays below 95 times in 100 (1.96 standard deviations, normal approximation).

    With independent Haar singular vectors E⟨ΔW, ΔW'⟩ = 0 and E⟨ΔW, ΔW'⟩² = ‖ΔW‖²‖ΔW'‖²/(out·in) in each module.
    Runs that started from one A, which training moves little, act on the same inputs whatever they were taught: of them
    right singular vectors are as they are, left ones random, and E⟨ΔW, QΔW'⟩² = ‖ΔW·ΔW'ᵀ‖_F²/out for a Haar-random Q.
    That holds whatever the inputs have in common, and so stands where the start is not known.
    """
    one_a = pair.right_overlap / pair.outputs
    apart = pair.squared_a * pair.squared_b / (pair.outputs * pair.inputs)
    variance = np.where(pair.same_a == 0, apart.sum(axis=-1), one_a.sum(axis=-1))
    return _ratio(_TWO_SIDED_95 * np.sqrt(variance), _norms(pair))


def _norms(pair: PairWeights) -> Array:
    return np.sqrt(pair.squared_a.sum(axis=-1)) * np.sqrt(pair.squared_b.sum(axis=-1))


def orthogonal_share(cosines: Array) -> Array:
    """‖Δ − Π_ref Δ‖/‖Δ‖ = √(1 − cos²): the share of an update's norm (not energy) that no multiple of another gives."""
    return np.sqrt(np.maximum(0.0, 1 - cosines**2))


def random_agreement(dimensions: Array) -> Array:
    """The mean over the last axis of E|⟨u, u'⟩| for independent unit vectors in ℝᵈ: Γ(d/2)/(√π·Γ((d + 1)/2))."""
    from scipy.special import gammaln  # slow to import, and what shows measures needs none of it

    return np.mean(np.exp(gammaln(dimensions / 2) - gammaln((dimensions + 1) / 2)) / np.sqrt(np.pi), axis=-1)


def _agreement_null(side: Literal["left", "right"], pair: PairWeights) -> Array:
    return random_agreement(_dimensions(side, pair))


def _angle(side: Literal["left", "right"], end: Callable[[Array], Array], pair: PairWeights) -> Array:
    return median(end(pair.angles_left if side == "left" else pair.angles_right))


def _angle_null(side: Literal["left", "right"], end: int, pair: PairWeights) -> Array:
    """The expected median over modules of the smallest (0) or largest (1) angle of random subspaces, degrees."""
    spaces = np.stack([_dimensions(side, pair), np.broadcast_to(pair.widths, pair.inner.shape)], axis=-1)
    flat = spaces.reshape(-1, *spaces.shape[-2:])
    if not len(flat):
        return np.zeros(spaces.shape[:-2])
    unique, places = np.unique(flat, axis=0, return_inverse=True)
    values = [
        np.nan if np.isnan(each).any() else pair.draw(tuple(sorted((int(d), int(k), int(k)) for d, k in each)))[end]
        for each in unique
    ]
    return np.array(values)[places.reshape(-1)].reshape(spaces.shape[:-2])


def overlap_left(pair: PairWeights) -> Array:
    """The overlap of the top-k left singular subspaces beyond chance, mean over modules; 1 for the same subspace.

    ‖UᵀU'‖_F²/k is the mean squared cosine of the principal angles, and k/out for two random subspaces; less that, and
    divided by what is left of 1, it is 0 on average where nothing is in common. Runs of unequal ranks are compared in
    as many directions as the smaller has, and each with itself in its own, so √(ρρ') is no ceiling of it.
    """
    chance = pair.widths / pair.outputs
    return mean((_mean_squared_cosine(pair.angles_left) - chance) / _positive(1 - chance))


def overlap_left_null(pair: PairWeights) -> Array:
    """The bound that |overlap| of random subspaces stays below 95 times in 100 (normal approximation).

    For Haar-random k-dimensional subspaces of ℝᵈ Var ‖UᵀU'‖_F² = 2k²(d − k)²/(d²(d − 1)(d + 2)), so that the variance
    of a module's overlap is 2/((d − 1)(d + 2)) whatever k.
    """
    known = ~np.isnan(_mean_squared_cosine(pair.angles_left)) & (pair.widths < pair.outputs)
    variance = np.where(known, 2 / ((pair.outputs - 1) * (pair.outputs + 2)), 0.0)
    return _ratio(_TWO_SIDED_95 * np.sqrt(variance.sum(axis=-1)), known.sum(axis=-1).astype(np.float64))


def _mean_squared_cosine(angles: Array) -> Array:
    return _ratio(np.nansum(np.cos(angles) ** 2, axis=-1), np.sum(~np.isnan(angles), axis=-1).astype(np.float64))


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
        "subspaces, median over modules, degrees; k = `top` = 10, or the smaller of the two ranks",
        source="Björck and Golub 1973; Knyazev and Argentati 2002",
        **more,
    )


def _agreement(name: Literal["u1", "v1"], place: float, **more: Any) -> WeightMeasure:
    symbol, way = ("u₁", "output") if name == "u1" else ("v₁", "input")
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
        definition=rf"\|⟨{symbol}, {symbol}'⟩\| of the top {side} ({way}) singular vectors, mean over modules",
        source="2606.23740",
        **more,
    )


MEASURES = (
    RunMeasure(
        name="norm", label="‖ΔW‖", place=1, tier="main", value=norm,
        summary="The size of the update: how far the weights have moved, in whatever direction.",
        definition="‖ΔW‖_F, all modules together",
    ),
    RunMeasure(
        name="relative_norm", label="‖ΔW‖ of ‖W0‖", short="of ‖W0‖", place=2, tier="more", unit="%", digits=1,
        needs_base=True, value=relative_norm, definition="‖ΔW‖_F/‖W0‖_F over the adapted modules",
    ),
    RunMeasure(
        name="effective_rank", label="effective rank", short="eff. rank", place=3, tier="main", digits=1,
        value=lambda run: mean(effective_rank(run.singular_values)),
        summary="How many directions an update really uses.",
        definition="exp of the entropy of σ/Σσ, mean over modules", source="Roy and Vetterli 2007",
    ),
    RunMeasure(
        name="stable_rank", label="stable rank", place=4, tier="more", digits=1,
        value=lambda run: mean(stable_rank(run.singular_values)),
        summary="The same, measured against the strongest direction: 1 where that one carries all.",
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
        summary="How far LoRA's A has turned from where it began, in degrees.",
        definition="largest principal angle between the row spaces of A and of the initial A, median over modules, "
        "degrees",
    ),
    RunMeasure(
        name="off_principal", label="off-principal share", short="off-principal", place=7, tier="more", unit="%",
        digits=1, needs_base=True, value=off_principal, null=off_principal_null,
        definition="1 − ‖U_kU_kᵀΔWV_kV_kᵀ‖²/‖ΔW‖², U_k and V_k the top-k singular vectors of W0: inside counts what "
        "lies in both. The null is a random update's, 1 − k²/(out·in)",
    ),
    WeightMeasure(
        name="cosine", label="cosine", place=20, tier="main", kind="similarity", identical=1.0, bounds=(-1.0, 1.0),
        value=cosine, null=cosine_null,
        summary="How far two updates point the same way: 1 the same direction, 0 unrelated, −1 opposite.",
        definition="Σ⟨ΔW_a, ΔW_b⟩/(‖ΔW_a‖·‖ΔW_b‖)", source="2606.23740",
    ),
    WeightMeasure(
        name="orthogonal_share", label="orthogonal share", place=21, kind="derived", identical=0.0,
        tier="more", derived=orthogonal_share, value=lambda pair: orthogonal_share(cosine(pair)),
        null=lambda pair: orthogonal_share(cosine_null(pair)),
        summary="The part of one update that has nothing to do with the other's direction.",
        definition="√(1 − cosine²): the share of the norm (not the energy) that no multiple of the other run gives; "
        "the same both ways", source="2606.23740",
    ),
    _agreement(
        "u1", 30, tier="more", summary="How well the strongest directions that two updates write (u₁) and read (v₁) "
        "agree: 1 the same, 0 unrelated.",
    ),
    _agreement("v1", 31, tier="more"),
    _angles(
        "left", "min", 40, tier="main", summary="The smallest angle between the main directions of two updates; left "
        "for what a layer writes, right for what it reads. 0°: they share a direction, 90°: they share none.",
    ),
    _angles("left", "max", 41),
    _angles("right", "min", 42, tier="main"),
    _angles("right", "max", 43),
    WeightMeasure(
        name="overlap_left", label="subspace overlap, left", short="overlap", place=45, tier="main",
        kind="level", identical=1.0, bounds=(-1.0, 1.0), value=overlap_left, null=overlap_left_null,
        term="overlap", summary="How much of the main directions that two updates write is common to both: 1 all, 0 "
        "no more than chance.",
        definition="(‖UᵀU'‖_F²/k − k/out)/(1 − k/out), U and U' the top-k left singular vectors, mean over modules: "
        "the mean squared cosine of the principal angles, beyond that of random subspaces", source="projection kernel, "
        "Hamm and Lee 2008",
    ),
)  # fmt: skip
