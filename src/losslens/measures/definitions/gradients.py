"""Measures of gradients before step 1: how alike two losses begin, and how much of a run's end its beginning decides.

G = −s·(∂L/∂B)·A is the step of gradient descent from the initial adapter, with L the loss of all rows as one batch. Its
parts G¹ + G² = G come from two halves of the problems.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from losslens.measures import RunMeasure, WeightMeasure
from losslens.measures.definitions.weight_space import cosine, cosine_null, ratio
from losslens.measures.views import Array, PairWeights, RunWeights

# Places in `RunWeights.gradients`.
_WHOLE, _SIGN, _END = 0, 2, 3


def first_step(run: RunWeights) -> Array:
    """Computes cos(G, ΔW) over all modules."""
    return _cosine(run.gradients.sum(axis=-3), _WHOLE, _END)


def sign_step(run: RunWeights) -> Array:
    """Computes cos(s·sign(−∂L/∂B)·A, ΔW) over all modules."""
    return _cosine(run.gradients.sum(axis=-3), _SIGN, _END)


def gradient_halves(run: RunWeights) -> Array:
    """Computes cos(G¹, G²) over all modules."""
    return _between_halves(run.gradients[..., :2, :2])


def gradient_cosine(pair: PairWeights) -> Array:
    """Computes cos(G_a, G_b) over all modules."""
    return cosine(_of_gradients(pair))


def gradient_cosine_null(pair: PairWeights) -> Array:
    """Computes the bound of |cos(G_a, G_b)| for gradients with unrelated outputs, as `cosine_null` does for updates."""
    return cosine_null(_of_gradients(pair))


def gradient_across(pair: PairWeights) -> Array:
    """Computes the mean of cos(G¹_a, G²_b) and cos(G²_a, G¹_b) over all modules."""
    halves = _halves(pair.gradients.sum(axis=-3))
    return (_cosine(halves, 0, 3) + _cosine(halves, 1, 2)) / 2


def gradient_ceiling(pair: PairWeights) -> Array:
    """Computes √(ρ_a·ρ_b), ρ = cos(G¹, G²); NaN unless both are above 0."""
    own = [_between_halves(pair.gradients[..., side, side]) for side in (slice(0, 2), slice(2, 4))]
    product = np.maximum(own[0], 0) * np.maximum(own[1], 0)
    return np.where(product > 0, np.sqrt(product), np.nan)


def _of_gradients(pair: PairWeights) -> PairWeights:
    """Returns the pair with its gradient steps in place of its updates, for the measures of a cosine."""
    own = pair.gradients
    return replace(
        pair,
        squared_a=own[..., 0, 0],
        squared_b=own[..., 2, 2],
        inner=own[..., 0, 2],
        right_overlap=pair.gradient_overlap,
    )


def _between_halves(products: Array) -> Array:
    return _cosine(_halves(products.sum(axis=-3)), 0, 1)


def _halves(products: Array) -> Array:
    """Turns inner products of (whole, half), for one or more gradients, into those of both halves: G² = G − G¹."""
    count = products.shape[-1] // 2
    turn = np.kron(np.eye(count), [[0.0, 1.0], [1.0, -1.0]])
    turned: Array = turn @ products @ turn.T
    return turned


def _cosine(products: Array, i: int, j: int) -> Array:
    norms = [np.sqrt(np.maximum(products[..., place, place], 0.0)) for place in (i, j)]
    return ratio(products[..., i, j], norms[0] * norms[1])


MEASURES = (
    RunMeasure(
        name="gradient_halves", label="gradient across halves of the problems", short="gradient halves", place=11.1,
        digits=2, bounds=(-1.0, 1.0), needs_gradient=True, value=gradient_halves, term="gradient halves",
        summary="How alike a loss's gradients before step 1 are on two halves of the problems: 1 the same, 0 each "
        "half's own.",
        definition="ρ = cos(G¹, G²), G¹ and G² the parts of the gradient step G from two halves of the problems: what "
        "a loss shares with itself on other problems, with half of the data",
    ),
    RunMeasure(
        name="first_step", label="own end along the gradient before step 1", short="along gradient", place=11.2,
        digits=2, bounds=(-1.0, 1.0), needs_gradient=True, value=first_step, term="own end along the gradient",
        summary="How much of the direction in which a run ended was that of its first step.",
        definition="cos(G, ΔW), G = −s·(∂L/∂B)·A the gradient step at the initial adapter (B = 0), L the loss of all "
        "rows as one batch", source="LoRA-One (ICML 2025) aligns LoRA with the gradient of one step",
    ),
    RunMeasure(
        name="sign_step", label="own end along the sign of the gradient", short="along its sign", place=11.3, digits=2,
        bounds=(-1.0, 1.0), needs_gradient=True, value=sign_step, term="own end along the gradient",
        definition="cos(s·sign(−∂L/∂B)·A, ΔW): the same of Adam's first step, which but for ε is the gradient's sign",
    ),
    WeightMeasure(
        name="gradient_cosine", label="gradient cosine before step 1", short="gradient cosine", place=22, tier="more",
        kind="level", identical=1.0, bounds=(-1.0, 1.0), value=gradient_cosine, null=gradient_cosine_null,
        term="gradient cosine",
        summary="How far two losses would take their first steps in the same direction; beside the cosine of the "
        "updates it says what was decided before training.",
        definition="cos(G_a, G_b), G = −s·(∂L/∂B)·A the gradient steps at the initial adapters (B = 0), L the loss of "
        "all rows of a run as one batch. Runs of one loss, initial adapter and rollouts have 1, whatever their data "
        "order", source="2606.19549 compares tasks by their gradients",
    ),
    WeightMeasure(
        name="gradient_across", label="gradient cosine across halves of the problems", short="across halves", place=23,
        tier="more", kind="level", identical=1.0, bounds=(-1.0, 1.0), value=gradient_across, term="gradient cosine",
        definition="½·(cos(G¹_a, G²_b) + cos(G²_a, G¹_b)): the gradient cosine of two losses that share no problem, "
        "each with half of the data; to be read beside `gradient_ceiling`",
    ),
    WeightMeasure(
        name="gradient_ceiling", label="ceiling of the gradient cosine across halves", short="ceiling across halves",
        place=24, tier="more", kind="level", identical=1.0, bounds=(0.0, 1.0), value=gradient_ceiling,
        term="gradient cosine",
        definition="√(ρ_a·ρ_b), ρ = `gradient_halves`: what `gradient_across` would be if the two losses were one; "
        "empty unless both are above 0", source="Spearman 1904",
    ),
)  # fmt: skip
