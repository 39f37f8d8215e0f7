"""Straightness and locking: by hand, from dense matrices, what does not change them, and their nulls by simulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from losslens.analysis.trajectories import half_time
from losslens.measures.comparison import compare
from losslens.measures.definitions.path import locking, locking_null, straightness, straightness_null
from losslens.measures.tables import ComparedWeights, RunPath, run_weights
from losslens.measures.trajectory import LEADING, left_overlaps, trajectory
from losslens.measures.views import RunWeights
from losslens.updates.base import Update
from losslens.updates.lora import LoraUpdate
from tests.measure_views import run_of
from tests.test_subspaces import random_delta
from tests.test_updates import DenseUpdate

pytestmark = pytest.mark.fast

SHAPES = {"a": (20, 9), "b": (14, 12)}
Point = dict[str, Update]


def drawn(seed: int, count: int, rank: int = 6) -> list[Point]:
    rng = np.random.default_rng(seed)
    return [{m: random_delta(rng, *shape, rank) for m, shape in SHAPES.items()} for _ in range(count)]


def view(points: Sequence[Point], half: int = 0) -> RunWeights:
    path = RunPath(
        trajectory(points, [], list(SHAPES)).steps, left_overlaps(points, points[-1:], list(SHAPES))[half, 0]
    )
    runs, _ = compare(points[-1:], list(SHAPES))
    return run_weights(
        ComparedWeights(list(SHAPES), list(SHAPES.values()), {"x": runs[0], "y": runs[0]}, {}, 4, paths={"x": path})
    )


def test_straightness_by_hand() -> None:
    """A step of 3 and one of 4 at a right angle: 5/7, which is the null. In one line: 1, of which the null is 5/7."""
    bent = run_of((1, 1), [4], singular_values=[[[5.0]]], steps=[[[9.0, 16.0]]])
    assert straightness(bent).item() == straightness_null(bent).item() == pytest.approx(5 / 7)
    straight = run_of((1, 1), [4], singular_values=[[[7.0]]], steps=[[[9.0, 16.0]]])
    assert straightness(straight).item() == 1
    assert straightness_null(straight).item() == pytest.approx(5 / 7)
    # Steps 3 and 0 in one module, 4 and 2 in another: lengths over both are 5 and 2.
    both = run_of((1, 2), [4, 4], singular_values=[[[3.0], [6.0]]], steps=[[[9.0, 0.0], [16.0, 4.0]]])
    assert straightness(both).item() == pytest.approx(np.sqrt(45) / 7)
    assert straightness(both.each())[0] == pytest.approx([1, 1])
    assert np.isnan(straightness(run_of((1, 1), [4], singular_values=[[[5.0]]])).item())


def test_locking_by_hand() -> None:
    """K = 4 of ten outputs, of which three are kept and one is left: (¾ − .4)/.6."""
    eye = np.eye(10)
    point = LoraUpdate(eye[:, [0, 1, 2, 3]] * [4, 3, 2, 1], eye[:4], 1.0)
    end = LoraUpdate(eye[:, [0, 1, 2, 4]] * [4, 3, 2, 1], eye[:4], 1.0)
    found = left_overlaps([{"m": point}], [{"m": end}, {"m": point}, {"m": 0.0 * end}], ["m"])[0, :, 0]
    assert found[:2] == pytest.approx([0.35 / 0.6, 1])
    assert np.isnan(found[2])
    known = run_of((1, 2), [10, 20], halfway=[[0.5, 0.1]])
    assert locking(known).item() == pytest.approx(0.3)
    assert locking_null(known).item() == pytest.approx(1.95996 * np.sqrt(2 / (9 * 12) + 2 / (19 * 22)) / 2, rel=1e-5)


def test_equals_the_dense_computation() -> None:
    points = drawn(0, 4)
    flat = np.array([np.concatenate([update.dense().ravel() for update in point.values()]) for point in points])
    length = np.linalg.norm(np.diff(np.concatenate([np.zeros((1, flat.shape[1])), flat]), axis=0), axis=1)
    found = view(points, half=1)
    assert straightness(found)[0] == pytest.approx(np.linalg.norm(flat[-1]) / length.sum(), rel=1e-9)
    assert straightness_null(found)[0] == pytest.approx(np.linalg.norm(length) / length.sum(), rel=1e-9)
    overlaps = []
    for module, (out, _) in SHAPES.items():
        u, v = (np.linalg.svd(points[n][module].dense())[0][:, :LEADING] for n in (1, 3))
        overlaps.append((np.linalg.norm(u.T @ v) ** 2 / LEADING - LEADING / out) / (1 - LEADING / out))
    assert locking(found)[0] == pytest.approx(np.mean(overlaps), rel=1e-9)
    assert np.isnan([straightness(found)[1], locking(found)[1]]).all()  # without snapshots
    dense = [{m: DenseUpdate(update.dense()) for m, update in point.items()} for point in points]
    assert straightness(view(dense))[0] == pytest.approx(straightness(found)[0], rel=1e-9)
    assert left_overlaps(dense, points, list(SHAPES)) == pytest.approx(
        left_overlaps(points, points, list(SHAPES)), abs=1e-9
    )


def test_what_changes_nothing() -> None:
    """BG and G⁻¹A, another G in each snapshot, and one factor for all of them."""
    rng = np.random.default_rng(1)
    points, turned = drawn(0, 3), []
    for point in points:
        turned.append({})
        for module, update in point.items():
            assert isinstance(update, LoraUpdate)
            gauge = np.linalg.qr(rng.standard_normal((6, 6)))[0] * rng.uniform(0.5, 2, 6)
            turned[-1][module] = LoraUpdate(update.b @ gauge, np.linalg.inv(gauge) @ update.a, -3 * update.scale)
    for measure in (straightness, straightness_null, locking, locking_null):
        assert measure(view(turned))[0] == pytest.approx(measure(view(points))[0], rel=1e-8), measure.__name__
    line = [{m: t * update for m, update in points[0].items()} for t in (0.2, 0.5, 2.0)]
    assert straightness(view(line))[0] == pytest.approx(1)
    assert locking(view(line))[0] == pytest.approx(1)


def test_null_of_straightness() -> None:
    """The mean square of 4000 paths with steps of given lengths in random directions."""
    rng = np.random.default_rng(2)
    lengths = np.array([3.0, 1.0, 2.0, 0.5])
    steps = rng.standard_normal((4000, 4, 30))
    steps *= lengths[:, None] / np.linalg.norm(steps, axis=2, keepdims=True)
    ends = np.linalg.norm(steps.sum(axis=1), axis=1)
    paths = run_of(
        (4000, 1), [30], singular_values=ends[:, None, None], steps=np.broadcast_to(lengths**2, (4000, 1, 4))
    )
    assert np.mean(straightness(paths) ** 2) == pytest.approx(np.mean(straightness_null(paths) ** 2), rel=0.02)


def test_null_of_locking() -> None:
    """Of 1500 random updates 95 in 100 stay within the bound, their mean is 0."""
    found = left_overlaps(drawn(3, 1500, 5), drawn(4, 1, 5), list(SHAPES))[:, 0]
    paths = run_of((1500, 2), [out for out, _ in SHAPES.values()], halfway=found)
    assert np.mean(np.abs(locking(paths)) < locking_null(paths)) == pytest.approx(0.95, abs=0.015)
    assert locking(paths).mean() == pytest.approx(0, abs=4 * locking(paths).std() / np.sqrt(1500))


@pytest.mark.parametrize(
    ("steps", "place"),
    [([50, 100], 0), ([4, 8, 12], 0), ([20, 40, 60, 80, 100], 1), ([10, 100], None), ([90, 100], None),
     ([25, 75, 100], None)],
)  # fmt: skip
def test_half_time(steps: list[int], place: int | None) -> None:
    """The snapshot at step 4 of 12 is a sixth of them from half-time; that at 25 of 100 is a quarter."""
    assert half_time(steps) == place
