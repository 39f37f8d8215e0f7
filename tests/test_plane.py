"""The map of the updates: classical scaling by hand, against scipy's distances, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import pdist, squareform
from scipy.stats import ortho_group

from losslens.analysis.tables import mds_table
from losslens.measures.mds import angles, mds

pytestmark = pytest.mark.fast


def test_three_points_by_hand() -> None:
    """A right triangle, legs 3 and 4. Centred corners (−1, −4/3), (2, −4/3), (−1, 8/3): XᵀX = [[6, −4], [−4, 32/3]], so
    λ = (50/3 ± √((14/3)² + 64))/2 = 12.968, 3.699; the plane has all of it."""
    found = mds(np.array([[0, 3, 4], [3, 0, 5], [4, 5, 0.0]]))
    lengths = np.square(found.points).sum(axis=0)
    root = math.sqrt((14 / 3) ** 2 + 64)
    assert lengths == pytest.approx([(50 / 3 + root) / 2, (50 / 3 - root) / 2])
    assert pdist(found.points) == pytest.approx([3, 4, 5])
    assert found.kept == pytest.approx(1)


def test_points_of_a_plane_get_their_distances_back() -> None:
    points = np.random.default_rng(0).normal(size=(12, 2)) * [5, 1]
    found = mds(squareform(pdist(points)))
    assert pdist(found.points) == pytest.approx(pdist(points))
    assert found.points.mean(axis=0) == pytest.approx([0, 0], abs=1e-12)
    assert found.kept == pytest.approx(1)


def test_the_share_that_is_kept_is_that_of_principal_components() -> None:
    """Of points in five dimensions: the two largest of the eigenvalues of their covariance."""
    points = np.random.default_rng(1).normal(size=(30, 5)) * [4, 3, 2, 1, 1]
    values = np.linalg.eigvalsh(np.cov(points.T))[::-1]
    found = mds(squareform(pdist(points)))
    assert found.kept == pytest.approx(values[:2].sum() / values.sum())
    scores = (points - points.mean(axis=0)) @ np.linalg.svd(points - points.mean(axis=0))[2][:2].T
    assert np.abs(found.points) == pytest.approx(np.abs(scores))


def test_neither_rotation_nor_order_changes_it() -> None:
    points = np.random.default_rng(2).normal(size=(9, 4))
    found = mds(squareform(pdist(points)))
    turned = points @ ortho_group.rvs(4, random_state=0) + 7
    assert mds(squareform(pdist(turned))).points == pytest.approx(found.points)
    order = np.random.default_rng(3).permutation(9)
    assert mds(squareform(pdist(points[order]))).points == pytest.approx(found.points[order])
    assert (found.points[np.abs(found.points).argmax(axis=0), [0, 1]] > 0).all()


def test_few_points_and_points_that_are_one() -> None:
    assert mds(np.zeros((1, 1))).points.tolist() == [[0, 0]]
    two = mds(np.array([[0, 6.0], [6, 0]]))
    assert np.abs(two.points) == pytest.approx(np.array([[3.0, 0], [3, 0]]))
    assert two.kept == pytest.approx(1)
    same = mds(np.zeros((3, 3)))
    assert same.points.tolist() == [[0, 0]] * 3
    assert math.isnan(same.kept)
    line = mds(squareform(pdist([[0.0], [1], [3]])))
    assert line.points[:, 1].tolist() == [0, 0, 0]


def test_directions_at_right_angles_do_not_lie_in_a_plane() -> None:
    """Four of them are a regular simplex: three equal eigenvalues, of which two are shown."""
    distances = np.full((4, 4), 90.0)
    np.fill_diagonal(distances, 0)
    assert mds(distances).kept == pytest.approx(2 / 3)


def test_distances_that_no_flat_space_has_count_as_not_shown() -> None:
    """1 and 1 on the way of 3: B = [[38, 5, −43], [5, −10, 5], [−43, 5, 38]]/18 has 9/2 along (1, 0, −1) and −5/6 along
    (1, −2, 1): 4.5/(4.5 + 5/6) = 27/32."""
    found = mds(np.array([[0, 1, 3], [1, 0, 1], [3, 1, 0.0]]))
    assert found.kept == pytest.approx(27 / 32)
    assert np.abs(found.points[:, 0]) == pytest.approx([1.5, 0, 1.5])
    assert found.points[:, 1].tolist() == [0, 0, 0]


def test_angles() -> None:
    assert angles(np.array([1 + 1e-15, 0.5, 0, -1])) == pytest.approx([0, 60, 90, 180])


def test_the_table() -> None:
    """60° and 60° on one great circle are 120°: points on a line, 60 apart; `z` is an update of 0."""
    pairs = pd.DataFrame(
        [("a", "b", 0.5), ("a", "c", -0.5), ("b", "c", 0.5), *((name, "z", np.nan) for name in "abc")],
        columns=["run_a", "run_b", "cosine"],
    )
    table, kept = mds_table(pairs)
    assert table["run"].tolist() == ["a", "b", "c"]
    assert np.abs(table["x"]).tolist() == pytest.approx([60, 0, 60])
    assert table["y"].tolist() == [0, 0, 0]
    assert kept == pytest.approx(1)


def test_the_table_of_one_run() -> None:
    table, kept = mds_table(pd.DataFrame(columns=["run_a", "run_b", "cosine"]))
    assert table.columns.tolist() == ["run", "x", "y"]
    assert table.empty
    assert math.isnan(kept)
