"""Singular vectors and principal angles against SciPy, by hand, and where the digits run out."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from losslens.measures.comparison import compare
from losslens.measures.subspaces import principal_angles
from losslens.updates.base import pair_products, pairs_of
from losslens.updates.lora import LoraUpdate
from losslens.updates.orthonormal import orthonormalise

pytestmark = pytest.mark.fast

SEEDS = st.integers(0, 2**31)


def random_delta(rng: np.random.Generator, out: int, into: int, rank: int) -> LoraUpdate:
    return LoraUpdate(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), float(rng.uniform(0.1, 3)))


def orthonormal(rng: np.random.Generator, d: int, k: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, k)))[0]


@given(SEEDS, st.integers(8, 40), st.integers(8, 40), st.integers(1, 8))
@settings(deadline=None)
def test_thin_svd_is_the_dense_one(seed: int, out: int, into: int, rank: int) -> None:
    delta = random_delta(np.random.default_rng(seed), out, into, rank)
    svd = delta.svd()
    assert np.allclose(svd.left * svd.values @ svd.right.T, delta.dense(), atol=1e-10)
    assert np.allclose(svd.values, np.linalg.svd(delta.dense(), compute_uv=False)[:rank], rtol=1e-9)
    assert np.allclose(svd.left.T @ svd.left, np.eye(rank), atol=1e-10)
    assert np.allclose(svd.right.T @ svd.right, np.eye(rank), atol=1e-10)
    leading = delta.svd(2)
    assert leading.left.shape == (out, min(2, rank))
    assert np.allclose(leading.left, svd.left[:, :2])
    assert np.allclose(leading.values, svd.values)


def test_null_directions_are_left_out() -> None:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((30, 4)), rng.standard_normal((4, 20))
    assert LoraUpdate(np.zeros((30, 4)), a, 1.0).svd().values.shape == (0,)
    b[:, 3] = b[:, 0]
    svd = LoraUpdate(b, a, 1.0).svd()
    assert svd.values.shape == (3,)
    assert np.allclose(svd.left * svd.values @ svd.right.T, b @ a)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e14])
def test_orthonormalise_at_any_condition(condition: float) -> None:
    rng = np.random.default_rng(1)
    matrix = orthonormal(rng, 200, 8) * np.geomspace(1, 1 / condition, 8) @ orthonormal(rng, 8, 8)
    basis = orthonormalise(matrix)
    q = basis.frame @ basis.turn
    assert np.allclose(q.T @ q, np.eye(8), atol=1e-10)
    assert np.allclose(q @ basis.r, matrix, atol=1e-14)


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


def test_vectors_and_values_of_ill_conditioned_factors() -> None:
    """B with a condition number of 900, of 1e5 and of 1e9: the SVD of ΔW is the dense one's."""
    rng = np.random.default_rng(6)
    for condition in (900.0, 1e5, 1e9):
        b = orthonormal(rng, 60, 6) * np.geomspace(1, 1 / condition, 6) @ orthonormal(rng, 6, 6)
        delta = LoraUpdate(b, rng.standard_normal((6, 50)), 2.0)
        u, values, vt = np.linalg.svd(delta.dense())
        svd = delta.svd()
        assert np.allclose(svd.values[:4], values[:4], rtol=1e-8)
        assert np.allclose(svd.values, values[:6], atol=1e-14)
        for k in range(3):
            assert abs(svd.left[:, k] @ u[:, k]) == pytest.approx(1, abs=1e-10)
            assert abs(svd.right[:, k] @ vt[k]) == pytest.approx(1, abs=1e-10)


class TestCompare:
    """All runs at once against each pair by itself, densely."""

    def runs(self) -> list[dict[str, LoraUpdate]]:
        """Mixed shapes and ranks, two runs that are almost the same, and one that is 0."""
        rng = np.random.default_rng(3)
        shapes = {"m": (60, 50), "n": (20, 90)}
        runs = [{m: random_delta(rng, *shape, rank) for m, shape in shapes.items()} for rank in (12, 4, 16, 10)]
        nearly = {m: LoraUpdate(d.b + 1e-7 * rng.standard_normal(d.b.shape), d.a, d.scale) for m, d in runs[0].items()}
        zero = {m: LoraUpdate(np.zeros_like(d.b), d.a, 1.0) for m, d in runs[1].items()}
        return [*runs, nearly, zero]

    def test_every_pair_is_the_dense_one(self) -> None:
        runs = self.runs()
        of_runs, of_pairs = compare(runs, ["m", "n"], top=10)
        assert list(of_pairs) == pairs_of(6, 6) == list(combinations(range(6), 2))
        for i, run in enumerate(runs):
            for m, module in enumerate(("m", "n")):
                values = of_runs[i].singular_values[m]
                values = values[~np.isnan(values)]
                expected = np.linalg.svd(run[module].dense(), compute_uv=False)
                assert np.allclose(values, expected[expected > 1e-9], rtol=1e-8)
        for (i, j), pair in of_pairs.items():
            for m, module in enumerate(("m", "n")):
                first, second = runs[i][module].dense(), runs[j][module].dense()
                assert pair.inner[m] == pytest.approx(np.sum(first * second), rel=1e-8, abs=1e-10)
                if 5 in (i, j):
                    assert np.isnan(pair.angles_left[m]).all()
                    assert np.isnan(pair.angles_right[m]).all()
                    assert np.isnan([pair.u1[m], pair.v1[m]]).all()
                    continue
                widths = [min(10, runs[n][module].a.shape[0]) for n in (i, j)]
                (u1, _, v1), (u2, _, v2) = np.linalg.svd(first), np.linalg.svd(second)
                k = min(widths)
                left = subspace_angles(u1[:, :k], u2[:, :k])[::-1]
                right = subspace_angles(v1[:k].T, v2[:k].T)[::-1]
                assert np.allclose(pair.angles_left[m, :k], left, atol=1e-6)
                assert np.allclose(pair.angles_right[m, :k], right, atol=1e-6)
                assert np.isnan(pair.angles_left[m, k:]).all()
                assert pair.u1[m] == pytest.approx(abs(u1[:, 0] @ u2[:, 0]), rel=1e-8)
                assert pair.v1[m] == pytest.approx(abs(v1[0] @ v2[0]), rel=1e-8)

    def test_of_unequal_ranks_as_many_directions_as_the_smaller_has(self) -> None:
        """e₁ against 2·e₂ + e₁ (each times e₁ᵀ or e₂ᵀ): of the second the first direction is e₂, so 90° and not 0°."""
        eye = np.eye(6)
        one = LoraUpdate(eye[:, :1], eye[:1], 1.0)
        two = LoraUpdate(np.stack([2 * eye[1], eye[0]], axis=1), eye[[1, 0]], 1.0)
        pair = compare([{"m": one}, {"m": two}], ["m"], top=10)[1][0, 1]
        assert np.degrees(pair.angles_left[0, 0]) == pytest.approx(90)
        assert np.degrees(pair.angles_right[0, 0]) == pytest.approx(90)
        assert np.isnan(pair.angles_left[0, 1:]).all()

    @pytest.mark.parametrize("angle", [1e-5, 1e-7])
    def test_an_angle_of_a_hundred_thousandth(self, angle: float) -> None:
        """Two runs whose left subspaces differ by `angle` in one direction and whose right ones are the same."""
        rng = np.random.default_rng(7)
        u, v = orthonormal(rng, 80, 5), orthonormal(rng, 70, 4)
        tilted = u[:, :4].copy()
        tilted[:, 3] = math.cos(angle) * u[:, 3] + math.sin(angle) * u[:, 4]
        sizes, gauge = np.diag([4.0, 3.0, 2.0, 1.0]), rng.standard_normal((4, 4))
        first = LoraUpdate(u[:, :4] @ sizes @ gauge, np.linalg.inv(gauge) @ v.T, 1.0)
        second = LoraUpdate(tilted @ sizes, v.T, 3.0)
        _, pairs = compare([{"m": first}, {"m": second}], ["m"], top=4)
        assert pairs[0, 1].angles_left[0, 3] == pytest.approx(angle, abs=1e-10)
        assert pairs[0, 1].angles_left[0, :3] == pytest.approx([0, 0, 0], abs=1e-10)
        assert pairs[0, 1].angles_right[0] == pytest.approx([0, 0, 0, 0], abs=1e-10)

    def test_only_what_is_fresh(self) -> None:
        runs = self.runs()
        _, every = compare(runs, ["m", "n"])
        assert every[0, 1].angles_left.shape == (2, 10)
        assert compare(runs, ["m", "n"], top=1000)[1][0, 1].angles_left.shape == (2, 16)
        of_runs, pairs = compare(runs, ["m", "n"], fresh=2)
        assert len(of_runs) == 2
        assert list(pairs) == [(0, n) for n in range(1, 6)] + [(1, n) for n in range(2, 6)]
        for pair, found in pairs.items():
            for name, values in vars(found).items():
                assert np.allclose(values, getattr(every[pair], name), rtol=1e-12, atol=1e-14, equal_nan=True)

    def test_drift_of_a_deficient_a(self) -> None:
        """Two equal rows, mixed: the row space is the same, and it has two dimensions, not three."""
        rng = np.random.default_rng(10)
        a = rng.standard_normal((2, 20))[[0, 1, 1]]
        b = rng.standard_normal((15, 3))
        run, first = {"m": LoraUpdate(b, rng.standard_normal((3, 3)) @ a, 1.0)}, {"m": LoraUpdate(b, a, 1.0)}
        assert compare([run], ["m"], initial=[first])[0][0].drift[0] == pytest.approx([0, 0], abs=1e-9)
        wider = {"m": LoraUpdate(b, np.vstack([a[:2], rng.standard_normal((1, 20))]), 1.0)}
        for one, other in ((run, wider), (wider, run)):
            assert compare([one], ["m"], initial=[other])[0][0].drift[0] == pytest.approx([0, 0], abs=1e-9)

    def test_drift(self) -> None:
        """A turned by θ out of the initial row space in one direction; the other directions stay."""
        rng = np.random.default_rng(8)
        v = orthonormal(rng, 40, 5)
        start = rng.standard_normal((4, 4)) @ v[:, :4].T
        turned = v[:, :4].copy()
        turned[:, 0] = math.cos(0.3) * v[:, 0] + math.sin(0.3) * v[:, 4]
        b = rng.standard_normal((30, 4))
        run, first = (
            {"m": LoraUpdate(b, rng.standard_normal((4, 4)) @ turned.T, 1.0)},
            {"m": LoraUpdate(0 * b, start, 1.0)},
        )
        of_runs, _ = compare([run, first], ["m"], initial=[first, first])
        assert of_runs[0].drift[0] == pytest.approx([0, 0, 0, 0.3], abs=1e-9)
        assert of_runs[1].drift[0] == pytest.approx([0, 0, 0, 0], abs=1e-9)
        assert compare([run], ["m"])[0][0].drift.shape == (1, 0)

    @given(SEEDS, st.integers(1, 6), st.integers(1, 6))
    @settings(deadline=None, max_examples=50)
    def test_what_changes_nothing(self, seed: int, rank: int, other: int) -> None:
        """B→BG with A→G⁻¹A changes nothing; a factor changes norms only; (a, b) is (b, a); a run is itself."""
        rng = np.random.default_rng(seed)
        first, second = random_delta(rng, 25, 20, rank), random_delta(rng, 25, 20, other)
        gauge = orthonormal(rng, rank, rank) * rng.uniform(0.5, 2, rank)
        moved = LoraUpdate(first.b @ gauge, np.linalg.inv(gauge) @ first.a, first.scale)
        scaled = LoraUpdate(-3 * first.b, first.a, first.scale)
        runs = [{"m": delta} for delta in (first, second, moved, scaled)]
        _, pairs = compare(runs, ["m"], top=4)
        swapped = compare(runs[1::-1], ["m"], top=4)[1][0, 1]
        gauged, tripled, plain = pairs[1, 2], pairs[1, 3], pairs[0, 1]
        for name in ("angles_left", "angles_right", "u1", "v1"):
            expected = getattr(plain, name)
            for same in (gauged, tripled, swapped):
                assert np.allclose(getattr(same, name), expected, atol=1e-6, equal_nan=True)
        for same, factor in ((gauged, 1), (swapped, 1), (tripled, -3)):
            assert same.inner[0] == pytest.approx(factor * plain.inner[0], rel=1e-9, abs=1e-9)
        itself = pairs[0, 2]
        assert itself.u1[0] == pytest.approx(1, abs=1e-9)
        k = min(rank, 4)
        if np.linalg.cond(first.b) < 1e3 and k == rank:  # else the top 4 are a choice among near equals
            assert np.allclose(itself.angles_left[0, :k], 0, atol=1e-7)


def test_products_of_several() -> None:
    rng = np.random.default_rng(9)
    deltas = [random_delta(rng, 30, 20, rank) for rank in (3, 1, 5)]
    expected = [np.sum(deltas[i].dense() * deltas[j].dense()) for i, j in combinations(range(3), 2)]
    overlaps = [np.sum((deltas[i].dense() @ deltas[j].dense().T) ** 2) for i, j in combinations(range(3), 2)]
    for found, wanted in zip(pair_products(deltas, 3), (expected, overlaps), strict=True):
        assert np.allclose(found, wanted, rtol=1e-12)
    assert np.allclose(pair_products(deltas, 1)[0], expected[:2], rtol=1e-12)
    assert pair_products(deltas[:1], 1)[0].shape == (0,)
