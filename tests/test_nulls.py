"""The nulls against drawn updates, densely, and against the angles that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from scipy.stats import wishart

from losslens.measures.definitions.weight_space import cosine_null, overlap_left, overlap_left_null, random_agreement
from losslens.measures.nulls import _wishart, expected_angles, random_angles
from tests.measure_views import pair_of

pytestmark = pytest.mark.fast


def random_cosine_bound(norms_a, norms_b, shapes) -> float:
    return cosine_null(pair_of(shapes, (norms_a, norms_b), same_a=0)).item()


def shared_cosine_bound(norms_a, norms_b, right_overlap, shapes) -> float:
    known = cosine_null(pair_of(shapes, (norms_a, norms_b), right_overlap=right_overlap, same_a=1)).item()
    # Where nobody knows, what holds in any case.
    unknown = cosine_null(pair_of(shapes, (norms_a, norms_b), right_overlap=right_overlap)).item()
    assert unknown == known or math.isnan(known)
    return known


@pytest.mark.parametrize(("d", "k", "l"), [(40, 10, 10), (40, 4, 10), (12, 10, 4), (12, 8, 8), (10, 10, 10)])
def test_angles_of_random_subspaces_are_those_of_drawn_ones(d: int, k: int, l: int) -> None:
    """The mean of each angle over 2000 draws, next to 1000 pairs of orthonormalised Gaussian matrices."""
    rng = np.random.default_rng(0)
    found = random_angles(d, k, l, 2000, rng)
    drawn = [subspace_angles(rng.standard_normal((d, k)), rng.standard_normal((d, l)))[::-1] for _ in range(1000)]
    assert found.shape == (2000, min(k, l))
    assert np.all(np.diff(found, axis=1) >= 0)
    assert np.all(found[:, : max(0, k + l - d)] == 0)
    assert np.allclose(found.mean(axis=0), np.mean(drawn, axis=0), atol=0.01)
    assert np.allclose(found.std(axis=0), np.std(drawn, axis=0), atol=0.01)


@pytest.mark.parametrize(("df", "size"), [(2550, 10), (3, 3), (7, 1)])
def test_wishart_matrices_are_those_of_scipy(df: int, size: int) -> None:
    ours = _wishart(df, size, 5, np.random.default_rng(3))
    theirs = wishart.rvs(df, np.eye(size), 5, np.random.default_rng(3)).reshape(5, size, size)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_one_line_against_another_in_the_plane() -> None:
    """The angle of two random lines in the plane is uniform on [0, 90°]: mean 45°, standard deviation 90/√12."""
    angles = np.degrees(random_angles(2, 1, 1, 20_000, np.random.default_rng(1)))[:, 0]
    assert angles.mean() == pytest.approx(45, abs=1)
    assert angles.std() == pytest.approx(90 / math.sqrt(12), abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "expected"), [(8, 85), (16, 82), (32, 77)])
def test_the_smallest_angle_at_the_papers_width(rank: int, expected: float) -> None:
    """About 85, 82 and 77 degrees for subspaces of 8, 16 and 32 dimensions of ℝ²⁵⁶⁰."""
    smallest, largest = expected_angles([(2560, rank, rank)] * 36)
    assert smallest == pytest.approx(expected, abs=1)
    assert 89 < largest < 90


def test_the_null_is_a_median_over_modules_and_seeded() -> None:
    spaces = [(40, 4, 4)] * 3 + [(4000, 4, 4)] * 2
    found = expected_angles(spaces)
    assert found == expected_angles(spaces)
    assert found != expected_angles(spaces, seed=1)
    # Of five modules the median is one of the three narrow ones.
    assert found[0] == pytest.approx(expected_angles(spaces[:3])[0], abs=8)
    assert math.isnan(expected_angles([(10, 0, 3)])[0])


def test_cosine_of_unrelated_updates() -> None:
    """Of 4000 pairs of random updates on two modules, 95 in 100 stay below the bound, and not many more."""
    rng = np.random.default_rng(2)
    shapes = [(12, 9), (6, 15)]
    norms, cosines = [], []
    for _ in range(4000):
        runs = [
            [
                rng.standard_normal((o, 3)) @ rng.standard_normal((3, i)) * s
                for (o, i), s in zip(shapes, (1, 2), strict=True)
            ]
            for _ in range(2)
        ]
        sizes = [np.array([np.linalg.norm(delta) for delta in run]) for run in runs]
        inner = sum(np.sum(a * b) for a, b in zip(*runs, strict=True))
        cosines.append(inner / np.linalg.norm(sizes[0]) / np.linalg.norm(sizes[1]))
        norms.append(random_cosine_bound(sizes[0], sizes[1], shapes))
    assert np.mean(np.abs(cosines) < norms) == pytest.approx(0.95, abs=0.015)


def test_cosine_bound_by_hand() -> None:
    """One module: 1.96/√(out·in). Two equal ones of norm 1: 1.96·√(2/100)/2."""
    assert random_cosine_bound(np.array([3.0]), np.array([5.0]), [(10, 10)]) == pytest.approx(1.95996 / 10, rel=1e-5)
    ones = np.ones(2)
    assert random_cosine_bound(ones, ones, [(10, 10)] * 2) == pytest.approx(1.95996 * math.sqrt(0.02) / 2, rel=1e-5)
    assert math.isnan(random_cosine_bound(np.zeros(1), np.ones(1), [(10, 10)]))


@pytest.mark.slow
def test_cosine_of_updates_that_share_their_inputs() -> None:
    """B and B' independent, A the same: the independent bound is far too low, this one holds 95 times in 100."""
    rng = np.random.default_rng(3)
    shapes = [(30, 40), (20, 60)]
    a = [rng.standard_normal((3, into)) for _, into in shapes]
    inside, inside_independent = [], []
    for _ in range(3000):
        first, second = ([rng.standard_normal((out, 3)) @ a[m] for m, (out, _) in enumerate(shapes)] for _ in range(2))
        norms = [np.array([np.linalg.norm(delta) for delta in run]) for run in (first, second)]
        overlaps = np.array([np.linalg.norm(x @ y.T) ** 2 for x, y in zip(first, second, strict=True)])
        inner = sum(np.sum(x * y) for x, y in zip(first, second, strict=True))
        cosine = abs(inner) / np.linalg.norm(norms[0]) / np.linalg.norm(norms[1])
        inside.append(cosine < shared_cosine_bound(*norms, overlaps, shapes))
        inside_independent.append(cosine < random_cosine_bound(*norms, shapes))
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)
    assert np.mean(inside_independent) < 0.6


def test_shared_cosine_bound_by_hand() -> None:
    """ΔW = ΔW' = e₁e₁ᵀ in ℝ⁴ˣ⁹: ‖ΔW·ΔW'ᵀ‖² = 1, so 1.96/√4; no common inputs: 0."""
    one = np.ones(1)
    assert shared_cosine_bound(one, one, one, [(4, 9)]) == pytest.approx(1.95996 / 2, rel=1e-5)
    assert shared_cosine_bound(2 * one, 3 * one, 0 * one, [(4, 9)]) == 0
    assert math.isnan(shared_cosine_bound(0 * one, one, 0 * one, [(4, 9)]))


def test_agreement_of_random_vectors() -> None:
    """In the plane E|cos θ| = 2/π; in space ½, since a coordinate of the sphere is uniform."""
    assert random_agreement(np.array([2])) == pytest.approx(2 / math.pi)
    assert random_agreement(np.array([3])) == pytest.approx(0.5)
    assert random_agreement(np.array([2, 3])) == pytest.approx((2 / math.pi + 0.5) / 2)
    assert random_agreement(np.array([4096])) == pytest.approx(math.sqrt(2 / math.pi / 4096), rel=1e-3)


def test_overlap_by_hand() -> None:
    """Two directions of ten: angles 0° and 60° give (1 + ¼)/2 = .625, chance is .2, so .425/.8; of all ten nothing."""
    angles = np.radians([[0.0, 60.0], [90.0, np.nan]])
    pair = pair_of([(10, 5), (4, 5)], angles_left=angles, widths=[2, 1])
    assert overlap_left(pair.at([0])).item() == pytest.approx(0.425 / 0.8)
    assert overlap_left(pair).item() == pytest.approx((0.425 / 0.8 - 0.25 / 0.75) / 2)
    assert overlap_left_null(pair.at([0])).item() == pytest.approx(1.95996 * math.sqrt(2 / (9 * 12)), rel=1e-5)
    whole = pair_of([(2, 5)], angles_left=np.zeros((1, 2)), widths=[2])
    assert np.isnan([overlap_left(whole).item(), overlap_left_null(whole).item()]).all()


@pytest.mark.parametrize(("d", "k"), [(40, 10), (12, 3), (60, 1)])
def test_overlap_of_random_subspaces(d: int, k: int) -> None:
    """Of 4000 drawn pairs: mean 0, the closed form's standard deviation; of 20 modules 95 in 100 within the bound."""
    draws = random_angles(d, k, k, 4000, np.random.default_rng(7))
    each = overlap_left(pair_of([(d, 9)], angles_left=draws[:, None, :], widths=[k]))
    assert each.mean() == pytest.approx(0, abs=4 * each.std() / math.sqrt(4000))
    assert each.std() == pytest.approx(math.sqrt(2 / ((d - 1) * (d + 2))), rel=0.06)
    modules = pair_of([(d, 9)] * 20, angles_left=draws.reshape(200, 20, k), widths=[k] * 20)
    bound = overlap_left_null(modules)
    assert np.mean(np.abs(overlap_left(modules)) < bound) == pytest.approx(0.95, abs=0.045)
