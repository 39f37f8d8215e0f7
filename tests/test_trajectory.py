"""The way of a run: by hand, against the dense computation, and that a norm that is asked for is met."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from losslens.measures.trajectory import NormCrossing, first_norm_crossing, interpolate, trajectory
from losslens.updates.lora import LoraUpdate
from tests.test_subspaces import random_delta

pytestmark = pytest.mark.fast

SEEDS = st.integers(0, 2**31)


def test_inner_by_hand() -> None:
    """ΔW = 2·(1, 2)ᵀ(1, 1) = ((2, 2), (4, 4)) and ΔW' = (1, 0)ᵀ(3, 0): 2·3 = 6."""
    first = LoraUpdate(np.array([[1.0], [2.0]]), np.array([[1.0, 1.0]]), 2.0)
    second = LoraUpdate(np.array([[1.0], [0.0]]), np.array([[3.0, 0.0]]), 1.0)
    assert first.inner(second) == second.inner(first) == 6.0


@given(SEEDS)
@settings(deadline=None)
def test_a_path_is_the_dense_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    modules = {"a": (9, 5), "b": (4, 7)}
    points, targets = (
        [{name: random_delta(rng, *shape, 2) for name, shape in modules.items()} for _ in range(count)]
        for count in (3, 2)
    )
    found = trajectory(points, targets, list(modules))
    flat, flat_targets = (
        np.array([np.concatenate([p[name].dense().ravel() for name in modules]) for p in of])
        for of in (points, targets)
    )
    assert np.allclose(found.norms, np.linalg.norm(flat, axis=1))
    assert np.allclose(found.to_next, np.sum(flat[:-1] * flat[1:], axis=1))
    before = np.concatenate([np.zeros((1, flat.shape[1])), flat[:-1]])
    assert np.allclose(found.steps.sum(axis=0), np.sum((flat - before) ** 2, axis=1))
    assert found.steps.shape == (2, 3)
    assert found.steps[0, 1] == pytest.approx(np.sum((points[1]["a"].dense() - points[0]["a"].dense()) ** 2))
    assert np.allclose(found.target_norms, np.linalg.norm(flat_targets, axis=1))
    cosines = flat @ flat_targets.T / np.outer(found.norms, found.target_norms)
    assert np.allclose(found.cosines, cosines)


def test_an_update_of_0_has_no_direction() -> None:
    rng = np.random.default_rng(0)
    nothing = LoraUpdate(np.zeros((4, 2)), rng.standard_normal((2, 3)), 1.0)
    found = trajectory([{"a": nothing}], [{"a": random_delta(rng, 4, 3, 2)}], ["a"])
    assert found.norms[0] == 0
    assert np.isnan(found.cosines).all()


class TestFirstCrossing:
    def test_by_hand(self) -> None:
        """From (3, 0) to (3, 4) the norm 4 is met at (3, 4t) with 9 + 16t² = 16: t = √7/4."""
        norms, to_next = [3.0, 5.0], [9.0]
        assert first_norm_crossing(norms, to_next, 4.0) == NormCrossing(0, pytest.approx(math.sqrt(7) / 4))
        assert first_norm_crossing(norms, to_next, 1.5) == NormCrossing(-1, pytest.approx(0.5))
        assert first_norm_crossing(norms, to_next, 3.0) == NormCrossing(-1, pytest.approx(1.0))
        assert first_norm_crossing(norms, to_next, 5.0) == NormCrossing(0, pytest.approx(1.0))
        assert first_norm_crossing(norms, to_next, 5.1) is None

    def test_the_first_of_several(self) -> None:
        """1 → 3 → 1 → 3 along one line passes 2 three times."""
        assert first_norm_crossing([1.0, 3.0, 1.0, 3.0], [3.0, 3.0, 3.0], 2.0) == NormCrossing(0, pytest.approx(0.5))

    @given(SEEDS, st.floats(0.01, 3.0))
    @settings(deadline=None)
    def test_the_norm_is_met(self, seed: int, norm: float) -> None:
        rng = np.random.default_rng(seed)
        points = [{"a": random_delta(rng, 6, 5, 2)} for _ in range(4)]
        found = trajectory(points, [], ["a"])
        norm *= float(found.norms.mean())
        crossing = first_norm_crossing(found.norms, found.to_next, norm)
        if crossing is None:
            assert norm > found.norms.max()
            return
        before = points[crossing.before]["a"] if crossing.before >= 0 else None
        there = interpolate(before, points[crossing.before + 1]["a"], crossing.weight)
        assert np.linalg.norm(there.dense()) == pytest.approx(norm, rel=1e-9)
        start = np.zeros((6, 5)) if before is None else before.dense()
        end = points[crossing.before + 1]["a"].dense()
        assert np.allclose(there.dense(), (1 - crossing.weight) * start + crossing.weight * end)
        assert (found.norms[: crossing.before + 1] < norm).all()
