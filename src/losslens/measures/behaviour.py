"""Effects of updates on the function: results of forward passes of one run, and of two runs, with their nulls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from losslens.measures.activations import COMPLETION, participation_ratio, shift_cosine, shift_size
from losslens.measures.outputs import cosines, jensen_shannon, kl, output_shifts
from losslens.updates.base import Array

_QUANTILE = 0.95


@dataclass(frozen=True)
class Observation:
    """Outputs and hidden states of one model on fixed sequences: S sequences, T scored tokens.

    Attributes:
        log_probs: Log-probabilities of the kept tokens at each scored position, shape (T, K) (`measures.kept_tokens`).
        states: Hidden states by position, shape (positions, L, S, d) (`measures.activations`).
    """

    log_probs: Array
    states: Array


@dataclass(frozen=True)
class OffTask:
    """Outputs of one model on the off-task text: T scored tokens.

    Attributes:
        log_probs: Log-probabilities of the kept tokens, shape (T, K).
        nll: −log π of each sequence in nats, summed over its tokens.
    """

    log_probs: Array
    nll: Array

    def change(self, base: OffTask) -> float:
        """Computes the change of the cross-entropy from the base's, in nats per token."""
        return float(self.nll.sum() - base.nll.sum()) / len(self.log_probs)

    def kl(self, base: OffTask) -> float:
        """Computes KL(base ‖ model) in nats per token."""
        return float(kl(base.log_probs, self.log_probs).mean())


@dataclass(frozen=True)
class RotatedCopies:
    """Copies of one update with random left singular vectors, D draws.

    Norm, spectrum and inputs are kept. `kl`, `off_task_kl` and `off_task_change` are of copies of the update's norm,
    `observations` of copies scaled to the update's KL.

    Attributes:
        kl: KL to the base, shape (D,).
        off_task_kl: KL to the base on the off-task text, shape (D,).
        off_task_change: Change of the cross-entropy on the off-task text, shape (D,).
        observations: What the scaled copies do, length D.
    """

    kl: Array
    off_task_kl: Array
    off_task_change: Array
    observations: tuple[Observation, ...]


@dataclass(frozen=True)
class RunBehaviour:
    """Behaviour of one run, compared with the base; NaN in nulls without rotated copies.

    Attributes:
        kl: KL(base ‖ run), nats per token.
        kl_quantile: 95% quantile over tokens of that KL, nats.
        kl_copies: KL of rotated copies of the same norm, shape (D,).
        shift_size: Relative size of the shift of hidden states, shape (positions, L).
        shift_size_null: The same of rotated copies of the same KL, mean over draws.
        rank: Participation ratio of the last hidden state.
        rank_null: The same of rotated copies of the same KL, mean over draws.
        off_task_kl: KL(base ‖ run) on the off-task text, nats per token.
        off_task_kl_null: The same of rotated copies of the same norm, mean over draws.
        off_task_change: Change of the cross-entropy on the off-task text, nats per token.
        off_task_change_null: 95% bound of its absolute value in rotated copies of the same norm (`prediction_bound`).
    """

    kl: float
    kl_quantile: float
    kl_copies: Array
    shift_size: Array
    shift_size_null: Array
    rank: float
    rank_null: float
    off_task_kl: float
    off_task_kl_null: float
    off_task_change: float
    off_task_change_null: float


@dataclass(frozen=True)
class PairBehaviour:
    """Behaviour of two runs, compared with each other; NaN in nulls without rotated copies of both.

    Nulls are of rotated copies scaled to each run's KL: D draws of one run against the D − 1 others of the other run.
    Their cosines are not centred on 0.

    Attributes:
        output_cosine: Cosine of the output shifts.
        output_cosine_null: 95% bound of its absolute value (`prediction_bound`).
        js: Jensen–Shannon divergence of the two, nats per token.
        js_null: Its mean over D pairs of draws.
        shift_cosine: Cosine of the shifts of hidden states, shape (positions, L).
        shift_cosine_null: 95% bound of its absolute value (`prediction_bound`), shape (positions, L).
    """

    output_cosine: float
    output_cosine_null: float
    js: float
    js_null: float
    shift_cosine: Array
    shift_cosine_null: Array


def representation_rank(observation: Observation) -> float:
    """Computes the participation ratio of the last hidden state, pooled over each completion."""
    return participation_ratio(observation.states[COMPLETION, -1])


def run_behaviour(
    base: Observation, run: Observation, base_off_task: OffTask, off_task: OffTask, copies: RotatedCopies
) -> RunBehaviour:
    """Compares one run with the base.

    Args:
        base: The base on the probe set.
        run: The run on the probe set.
        base_off_task: The base on the off-task text.
        off_task: The run on the off-task text.
        copies: Rotated copies of the run's update; with 0 draws there are no nulls.
    """
    per_token = kl(base.log_probs, run.log_probs)
    sizes = [shift_size(copy.states - base.states, base.states) for copy in copies.observations]
    own = shift_size(run.states - base.states, base.states)
    return RunBehaviour(
        kl=float(per_token.mean()),
        kl_quantile=float(np.quantile(per_token, _QUANTILE)),
        kl_copies=copies.kl,
        shift_size=own,
        shift_size_null=np.mean(sizes, axis=0) if sizes else np.full(own.shape, np.nan),
        rank=representation_rank(run),
        rank_null=_mean(np.array([representation_rank(copy) for copy in copies.observations])),
        off_task_kl=off_task.kl(base_off_task),
        off_task_kl_null=_mean(copies.off_task_kl),
        off_task_change=off_task.change(base_off_task),
        off_task_change_null=float(prediction_bound(copies.off_task_change, len(copies.off_task_change))),
    )


class Shifted:
    """The shifts of one run and of its rotated copies from the base.

    Args:
        base: The base on the probe set.
        run: The run on the probe set.
        copies: Its rotated copies, scaled to its KL.
    """

    def __init__(self, base: Observation, run: Observation, copies: tuple[Observation, ...]) -> None:
        self.log_probs = [run.log_probs, *(copy.log_probs for copy in copies)]
        # In float32, so that many runs fit: products of such vectors are exact to 1e-7.
        self.outputs = output_shifts(base.log_probs, self.log_probs).astype(np.float32)
        self.states = [run.states - base.states, *(copy.states - base.states for copy in copies)]


def pair_behaviour(first: Shifted, second: Shifted) -> PairBehaviour:
    """Compares two runs."""
    outputs = cosines(first.outputs, second.outputs)
    own = shift_cosine(first.states[0], second.states[0])
    copies = min(len(first.states), len(second.states)) - 1
    # Not draws of one number: where two adapters are equal to the byte, so are these.
    pairs = [(i, j) for i in range(1, copies + 1) for j in range(1, copies + 1) if i != j]
    drawn = np.array([shift_cosine(first.states[i], second.states[j]) for i, j in pairs])
    apart = [jensen_shannon(first.log_probs[i], second.log_probs[j]) for i, j in pairs if j == i % copies + 1]
    return PairBehaviour(
        output_cosine=float(outputs[0, 0]),
        output_cosine_null=float(
            np.minimum(1.0, prediction_bound(np.array([outputs[pair] for pair in pairs]), copies))
        ),
        js=jensen_shannon(first.log_probs[0], second.log_probs[0]),
        js_null=_mean(np.array(apart)),
        shift_cosine=own,
        shift_cosine_null=np.minimum(1.0, prediction_bound(drawn, copies)) if pairs else np.full(own.shape, np.nan),
    )


def prediction_bound(values: Array, copies: int) -> Array:
    """Computes a 95% bound of the absolute value of a further draw: |mean| + t_{D−1}·sd·√(1 + 1/D).

    Args:
        values: Values of rotated copies, or of pairs of them, along the first axis.
        copies: D, the number of copies of a run; fewer than 2 have no spread, and the bound is NaN.
    """
    from scipy.stats import t as student  # slow to import

    if copies < 2:
        return np.full(values.shape[1:], np.nan)
    spread = values.std(axis=0, ddof=1) * np.sqrt(1 + 1 / copies)
    bound: Array = np.abs(values.mean(axis=0)) + student.ppf(0.975, copies - 1) * spread
    return bound


def _mean(draws: Array) -> float:
    return float(draws.mean()) if draws.size else float("nan")
