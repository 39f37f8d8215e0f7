"""The distance of two profiles: by hand, from dense matrices, and what does not change it."""

from __future__ import annotations

import numpy as np
import pytest

from losslens.measures.comparison import compare
from losslens.measures.definitions.profile import profile_distance
from losslens.measures.tables import ComparedWeights, weight_tables
from losslens.updates.base import Update
from losslens.updates.lora import LoraUpdate
from tests.measure_views import pair_of
from tests.test_subspaces import random_delta

pytestmark = pytest.mark.fast

SHAPES = {"layers.0.q": (9, 7), "layers.0.v": (6, 8), "layers.1.q": (9, 7)}


def drawn(seed: int) -> dict[str, Update]:
    rng = np.random.default_rng(seed)
    return {m: random_delta(rng, *shape, 3) for m, shape in SHAPES.items()}


def distance(*runs: dict[str, Update]) -> np.ndarray:
    """Of the first two runs: of all modules, of layer 0, of layer 1."""
    of_runs, of_pairs = compare(list(runs), list(SHAPES))
    names = dict(zip("ab", of_runs, strict=True))
    found = weight_tables(ComparedWeights(list(SHAPES), list(SHAPES.values()), names, {("a", "b"): of_pairs[0, 1]}, 3))
    return np.array([*found.pairs["profile_distance"], *found.layers["profile_distance"]])


def test_by_hand() -> None:
    """Norms 1, 1, √2 and 3, 1, 0: shares ¼, ¼, ½ and .9, .1, 0, so ½(.65 + .15 + .5). In the first two: ½(.4 + .4)."""
    pair = pair_of([(4, 4)] * 3, ([1, 1, np.sqrt(2)], [3, 1, 0]))
    assert profile_distance(pair).item() == pytest.approx(0.65)
    assert profile_distance(pair.at([0, 1])).item() == pytest.approx(0.4)
    assert profile_distance(pair.at([0])).item() == 0
    assert np.isnan(profile_distance(pair.at([2])).item())
    # Nothing in one module for both.
    assert profile_distance(pair_of([(4, 4)] * 2, ([1, 0], [0, 2]))).item() == 1


def test_equals_the_dense_computation() -> None:
    runs = [drawn(0), drawn(1)]
    energies = np.array([[np.sum(update.dense() ** 2) for update in run.values()] for run in runs])
    wanted = []
    for modules in ([0, 1, 2], [0, 1], [2]):
        shares = energies[:, modules] / energies[:, modules].sum(axis=1, keepdims=True)
        wanted.append(np.maximum(shares[0] - shares[1], 0).sum())  # what has to move
    assert distance(*runs) == pytest.approx(wanted, rel=1e-9)


def test_what_changes_nothing() -> None:
    """3·ΔW, BG and G⁻¹A, and the order of the two; three distances obey the triangle inequality."""
    first, second, third = (drawn(seed) for seed in range(3))
    gauge = np.array([[2.0, 1, 0], [0, 1, 3], [0, 0, 0.5]])
    turned: dict[str, Update] = {}
    for module, update in first.items():
        assert isinstance(update, LoraUpdate)
        turned[module] = LoraUpdate(update.b @ gauge, np.linalg.inv(gauge) @ update.a, 3 * update.scale)
    assert distance(turned, second) == pytest.approx(distance(first, second), rel=1e-9)
    assert distance(second, first) == pytest.approx(distance(first, second), rel=1e-12)
    assert np.all(distance(first, third) <= distance(first, second) + distance(second, third) + 1e-12)
