"""Singular vectors and principal angles against SciPy, by hand, and where the digits run out."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from losslens.geometry.comparison import _side, compare_modules, inner_products
from losslens.geometry.deltas import Delta
from losslens.geometry.subspaces import orthonormalise, principal_angles, thin_svd

SEEDS = st.integers(0, 2**31)


def random_delta(rng: np.random.Generator, out: int, into: int, rank: int) -> Delta:
    return Delta(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), float(rng.uniform(0.1, 3)))


def dense(delta: Delta) -> np.ndarray:
    return delta.scale * delta.b @ delta.a


def orthonormal(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


@given(SEEDS, st.integers(8, 40), st.integers(8, 40), st.integers(1, 8))
@settings(deadline=None)
def test_thin_svd_is_the_dense_one(seed: int, out: int, into: int, rank: int) -> None:
    delta = random_delta(np.random.default_rng(seed), out, into, rank)
    svd = thin_svd(delta)
    assert np.allclose(svd.left * svd.values @ svd.right.T, dense(delta), atol=1e-10)
    assert np.allclose(svd.values, np.linalg.svd(dense(delta), compute_uv=False)[:rank], rtol=1e-9)
    assert np.allclose(svd.left.T @ svd.left, np.eye(rank), atol=1e-13)
    assert np.allclose(svd.right.T @ svd.right, np.eye(rank), atol=1e-13)


def test_null_directions_are_left_out() -> None:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((30, 4)), rng.standard_normal((4, 20))
    assert thin_svd(Delta(np.zeros((30, 4)), a, 1.0)).values.shape == (0,)
    b[:, 3] = b[:, 0]
    svd = thin_svd(Delta(b, a, 1.0))
    assert svd.values.shape == (3,)
    assert np.allclose(svd.left * svd.values @ svd.right.T, b @ a)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e14])
def test_orthonormalise_at_any_condition(condition: float) -> None:
    rng = np.random.default_rng(1)
    matrix = orthonormal(rng, 200, 8) * np.geomspace(1, 1 / condition, 8) @ orthonormal(rng, 8, 8)
    q, r = orthonormalise(matrix)
    assert np.allclose(q.T @ q, np.eye(8), atol=1e-13)
    assert np.allclose(q @ r, matrix, atol=1e-14)


@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None)
def test_angles_are_scipys(seed: int, k: int, other: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = orthonormal(rng, 30, k), orthonormal(rng, 30, other)
    assert np.allclose(principal_angles(first, second), subspace_angles(first, second)[::-1], atol=1e-9)
    assert np.allclose(principal_angles(first, second), principal_angles(second, first), atol=1e-9)


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, math.pi / 4, math.pi / 2])
def test_a_known_angle(angle: float) -> None:
    """span(e₁, e₂) and span(cos θ·e₁ + sin θ·e₃, e₂): angles 0 and θ, in any basis and turned in space."""
    rng = np.random.default_rng(2)
    eye, turn = np.eye(50), orthonormal(rng, 50, 50)
    first = turn @ eye[:, :2] @ orthonormal(rng, 2, 2)
    tilted = np.stack([math.cos(angle) * eye[0] + math.sin(angle) * eye[2], eye[1]], axis=1)
    second = turn @ tilted @ orthonormal(rng, 2, 2)
    found = principal_angles(first, second)
    assert found == pytest.approx([0, angle], abs=2e-15 if angle <= 1e-3 else 1e-9)


def test_all_pairs_at_once_are_the_pairs_one_by_one() -> None:
    """Mixed ranks, a run that is 0, and two runs that are almost the same."""
    rng = np.random.default_rng(3)
    deltas = [random_delta(rng, 60, 50, rank) for rank in (12, 4, 16, 10)]
    nearly = Delta(deltas[0].b + 1e-7 * rng.standard_normal((60, 12)), deltas[0].a, deltas[0].scale)
    deltas += [nearly, Delta(np.zeros((60, 4)), deltas[1].a, 1.0)]
    svds = [thin_svd(delta) for delta in deltas]
    for side in ("left", "right"):
        vectors = [getattr(svd, side) for svd in svds]
        angles, first = _side(vectors, top=10)
        for n, (i, j) in enumerate(combinations(range(6), 2)):
            expected = principal_angles(vectors[i][:, :10], vectors[j][:, :10])
            assert np.allclose(angles[n, : len(expected)], expected, atol=1e-10)
            assert np.isnan(angles[n, len(expected) :]).all()
            if 5 in (i, j):
                assert np.isnan(first[n])
            else:
                assert first[n] == pytest.approx(abs(vectors[i][:, 0] @ vectors[j][:, 0]))
    inner = inner_products(deltas)
    assert np.allclose(inner, [[np.sum(dense(x) * dense(y)) for y in deltas] for x in deltas], rtol=1e-10)


def test_comparison_of_modules() -> None:
    rng = np.random.default_rng(4)
    runs = [{"m": random_delta(rng, 40, 30, 6), "n": random_delta(rng, 20, 30, 3)} for _ in range(3)]
    found = list(compare_modules(runs, ["m", "n"], top=5))  # type: ignore[arg-type]
    assert [c.module for c in found] == ["m", "n"]
    assert found[0].angles_left.shape == (3, 5)
    assert np.isnan(found[1].angles_left[:, 3:]).all()
    assert found[0].inner[1, 1] == pytest.approx(np.sum(found[0].singular_values[1] ** 2))
