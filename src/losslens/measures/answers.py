"""Agreement of two models' answers, problem by problem: flips against the base, and Cohen's κ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from losslens.measures.behaviour import prediction_bound

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PairAnswers:
    """Agreement of the answers of two runs; NaN where undefined, and in nulls without answers of rotated copies.

    Nulls are of rotated copies scaled to each run's KL: D draws of one run against the D − 1 others of the other run.

    Attributes:
        flips: Cosine of the flips against the base (`flip_cosine`).
        flips_null: 95% bound of its absolute value (`prediction_bound`).
        kappa: Cohen's κ of correct and incorrect (`kappa`).
        kappa_null: Its mean over draws.
    """

    flips: float
    flips_null: float
    kappa: float
    kappa_null: float


def flip_cosine(first: Array, second: Array, base: Array) -> float:
    """Computes the cosine of two runs' flips: Σ f_a·f_b/√(Σ f_a²·Σ f_b²) with f = x − x_base by problem, uncentred.

    Args:
        first: The share of correct samples of each problem, shape (problems,); 0 or 1 for single answers.
        second: The same for the other run.
        base: The same for the base.

    Returns:
        1 if both change the outcomes of the same problems in the same way, 0 if of different ones; NaN if a run changes
        none.
    """
    a, b = first - base, second - base
    size = float(np.sqrt(np.sum(a**2) * np.sum(b**2)))
    return float(a @ b) / size if size > 0 else np.nan


def kappa(first: Array, second: Array) -> float:
    """Computes Cohen's κ (1960) of correct and incorrect: (p_o − p_e)/(1 − p_e).

    p_o is the share of problems on which both are correct or both incorrect, and p_e = p_a·p_b + (1 − p_a)·(1 − p_b)
    what two runs of these accuracies p would share by chance. Geirhos et al. (2020) call it error consistency.

    Args:
        first: Outcomes of single answers, 0 or 1, shape (problems,).
        second: The same for the other run.

    Returns:
        NaN for averages over several samples, and where p_e is 1.
    """
    if not np.isin([first, second], [0, 1]).all():
        return np.nan
    p_a, p_b = float(np.mean(first)), float(np.mean(second))
    chance = p_a * p_b + (1 - p_a) * (1 - p_b)
    return (float(np.mean(first == second)) - chance) / (1 - chance) if chance < 1 else np.nan


def pair_answers(
    first: Array, second: Array, base: Array | None, copies_a: Sequence[Array] = (), copies_b: Sequence[Array] = ()
) -> PairAnswers:
    """Compares the answers of two runs to the same problems.

    Args:
        first: The share of correct samples of each problem, shape (problems,).
        second: The same for the other run.
        base: The same for the base; None if it was not scored.
        copies_a: The same for each rotated copy of the first run.
        copies_b: The same for each rotated copy of the second run.
    """
    copies = min(len(copies_a), len(copies_b))
    # Not the same draws: where two adapters are equal to the byte, so are these.
    pairs = [(copies_a[i], copies_b[j]) for i in range(copies) for j in range(copies) if i != j]

    def flips(a: Array, b: Array) -> float:
        return np.nan if base is None else flip_cosine(a, b, base)

    def drawn(value: Callable[[Array, Array], float]) -> Array:
        return np.array([value(a, b) for a, b in pairs])

    return PairAnswers(
        flips=flips(first, second),
        flips_null=float(np.minimum(1.0, prediction_bound(drawn(flips), copies))),
        kappa=kappa(first, second),
        kappa_null=float(np.mean(drawn(kappa))) if pairs else np.nan,
    )
