"""Similarities of all runs of a sweep: of weights, of what these do to outputs and activations, and of flips."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from losslens.analysis.cohort import ComparedAdapter
from losslens.measures.activations import COMPLETION
from losslens.measures.behaviour import Observation
from losslens.measures.forward import Sequences, sequence_losses
from losslens.measures.outputs import output_shifts

Array = NDArray[np.float64]


def gram(vectors: Array) -> Array:
    """Computes the inner products of every two rows, shape (N, N)."""
    flat = vectors.reshape(len(vectors), -1)
    products: Array = flat @ flat.T
    return products


def normalised(products: Array) -> Array:
    """Divides inner products by both lengths; NaN for a zero vector."""
    lengths = np.sqrt(np.diag(products))
    found: Array = np.divide(
        products, np.outer(lengths, lengths), out=np.full(products.shape, np.nan), where=np.outer(lengths, lengths) > 0
    )
    return found


def dense_updates(members: Sequence[ComparedAdapter], modules: Sequence[str]) -> Iterator[tuple[str, Array]]:
    """Yields each module with ΔW of every run, shape (N, out, in)."""
    with ExitStack() as stack:
        opened = [stack.enter_context(member.point.open()) for member in members]
        for module in modules:
            yield module, np.stack([update[module].dense() for update in opened])


def weight_products(updates: Iterator[tuple[str, Array]], second_moments: dict[str, Array]) -> tuple[Array, Array]:
    """Computes ⟨ΔW_a, ΔW_b⟩ and tr(ΔW_a·C·ΔW_bᵀ), summed over modules, shape (N, N) each.

    Args:
        updates: Modules with ΔW of every run.
        second_moments: C = E[xxᵀ] of the input of each module.
    """
    weights: Array | float = 0.0
    inputs: Array | float = 0.0
    for module, changes in updates:
        weights = weights + gram(changes)
        weighted = changes @ second_moments[module]
        inputs = inputs + weighted.reshape(len(changes), -1) @ changes.reshape(len(changes), -1).T
    return np.asarray(weights), np.asarray(inputs)


def input_second_moments(model: Any, modules: Sequence[str], sequences: Sequences) -> dict[str, Array]:
    """Computes C = E[xxᵀ] over the tokens of prompts and completions, for the input of each module.

    Args:
        model: The base.
        modules: Names of linear modules.
        sequences: Token ids of prompts and completions.
    """
    totals: dict[str, Array] = {}
    counts = dict.fromkeys(modules, 0)

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def add(_: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().double().cpu().numpy().reshape(-1, inputs[0].shape[-1])
            totals[name] = totals.get(name, 0.0) + x.T @ x
            counts[name] += len(x)

        return add

    with ExitStack() as stack:
        for name in modules:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        sequence_losses(model, sequences, 1)  # one at a time, so that no input is padding
    return {name: totals[name] / counts[name] for name in modules}


def output_products(base: Observation, runs: Sequence[Observation]) -> Array:
    """Computes the inner products of the output shifts of every two runs, shape (N, N)."""
    return gram(output_shifts(base.log_probs, [run.log_probs for run in runs]))


def kl_products(base: Observation, runs: Sequence[Observation]) -> Array:
    """Computes those of the same shifts in the geometry of KL, shape (N, N).

    With J(p, q) = ½·(KL(p‖q) + KL(q‖p)) for the squared distance, ⟨a, b⟩ is ½·(J(a, base) + J(b, base) − J(a, b)),
    which is the mean over positions of ¼·Σ(Δp_a·Δlog p_b + Δp_b·Δlog p_a). Large changes count otherwise than in
    `output_products`, which weighs them by the probabilities of the base. The matrix is symmetric, but may
    have slightly negative eigenvalues: √J is no Euclidean distance.
    """
    logs = base.log_probs.astype(np.float64).reshape(-1)
    probabilities = np.exp(logs)
    shifts, changes = np.zeros((2, len(runs), logs.size))
    for shift, change, run in zip(shifts, changes, runs, strict=True):
        other = run.log_probs.astype(np.float64).reshape(-1)
        # What a model excludes has no logarithm.
        np.subtract(other, logs, out=shift, where=np.isfinite(logs) & np.isfinite(other))
        change[:] = np.exp(other) - probabilities
    products: Array = changes @ shifts.T / (4 * max(len(base.log_probs), 1))
    return products + products.T


def activation_products(base: Observation, runs: Sequence[Observation]) -> Array:
    """Computes those of the shifts of the last hidden state, averaged over each completion, shape (N, N)."""
    return gram(np.stack([(run.states - base.states)[COMPLETION, -1] for run in runs]).astype(np.float64))


def flip_products(correct: Array, base: Array) -> Array:
    """Computes those of the flips against the base, shape (N, N), from outcomes of shape (N, problems).

    Flips are centred among the problems that the base solves and among those that it does not: each can flip in one way
    only, so that even independent flips would be alike.
    """
    flips = correct - base
    for outcome in (0, 1):
        group = base == outcome
        if group.any():
            flips[:, group] -= flips[:, group].mean(axis=1, keepdims=True)
    return gram(flips)
