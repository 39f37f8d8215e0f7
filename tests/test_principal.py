"""Principal shares and projected rotation: by hand, against dense matrices, and their nulls against drawn updates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from losslens.measures import RunMeasure, get_measure
from losslens.measures.base_weights import principal, principal_parts
from losslens.measures.comparison import compare
from losslens.measures.nulls import beta_bound, frame_variance
from losslens.measures.tables import BaseComparison, ComparedWeights, run_weights
from losslens.measures.views import RunWeights
from losslens.updates.base import Update
from losslens.updates.lora import LoraUpdate
from tests.measure_views import run_of
from tests.test_subspaces import random_delta
from tests.test_updates import DenseUpdate

pytestmark = pytest.mark.fast

NAMES = ("principal_left", "principal_right", "projected_rotation")
SHAPES = {"a": (20, 15), "b": (12, 30)}


def measured(run: dict[str, Update], start: dict[str, Update], bases: dict[str, np.ndarray], top: int) -> RunWeights:
    modules = list(run)
    runs, _ = compare([run], modules, top=top, initial=[start])
    weights = {module: principal(bases[module], top) for module in modules}
    parts = [principal_parts(run[m], start[m].input_space(), weights[m]) for m in modules]
    against = BaseComparison.of(np.array([weights[m].norm for m in modules]), parts)
    shapes = [bases[module].shape for module in modules]
    return run_weights(ComparedWeights(modules, shapes, {"x": runs[0]}, {}, top, {"x": against}))


def shown(view: RunWeights, *names: str) -> list[float]:
    return [float(value_of(name, view)[0]) for name in names or NAMES]


def value_of(name: str, view: RunWeights) -> Any:
    name, null, _ = name.partition("_null")
    measure = get_measure(name)
    assert isinstance(measure, RunMeasure)
    assert measure.null is not None
    return (measure.null if null else measure.value)(view)


def drawn() -> tuple[dict[str, Update], dict[str, Update], dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    run: dict[str, Update] = {m: random_delta(rng, *shape, 3) for m, shape in SHAPES.items()}
    start: dict[str, Update] = {m: random_delta(rng, *shape, 3) for m, shape in SHAPES.items()}
    return run, start, {m: rng.standard_normal(shape) for m, shape in SHAPES.items()}


def test_by_hand() -> None:
    """W0 = diag(5, 4, 1, 0), k = 2; ΔW = 3·e₁e₁ᵀ + 4·e₃e₂ᵀ: left 9 of 25, right all of it, both 9.

    Of random outputs the energy of ΔW·V_k in two of four would be half: 9/(½·25). An update of e₃e₄ᵀ lies on neither
    side, and has no projected rotation.
    """
    eye = np.eye(4)
    base = {"m": np.diag([5.0, 4, 1, 0])}
    update = LoraUpdate(eye[:, [0, 2]] * [3, 4], eye[[0, 1]], 1.0)
    view = measured({"m": update}, {"m": update}, base, 2)
    assert shown(view) == pytest.approx([9 / 25, 1, math.sqrt(9 / 12.5)])
    # A's two inputs are W0's leading ones: any update on them has all its energy there.
    assert shown(view, "principal_right_null") == pytest.approx([1])
    outside = LoraUpdate(eye[:, [2]], eye[[3]], 2.0)
    found = shown(measured({"m": outside}, {"m": outside}, base, 2))
    assert found[:2] == [0, 0]
    assert math.isnan(found[2])


def test_equals_the_dense_computation() -> None:
    run, start, bases = drawn()
    top, total, left, right, both, chance = 4, 0.0, 0.0, 0.0, 0.0, 0.0
    for module, weight in bases.items():
        u, _, vt = np.linalg.svd(weight)
        full = run[module].dense()
        total += np.sum(full**2)
        left += np.sum((u[:, :top] @ u[:, :top].T @ full) ** 2)
        right += np.sum((full @ vt[:top].T @ vt[:top]) ** 2)
        both += np.sum((u[:, :top].T @ full @ vt[:top].T) ** 2)
        chance += top / len(full) * np.sum((full @ vt[:top].T) ** 2)
    view = measured(run, start, bases, top)
    assert shown(view) == pytest.approx([left / total, right / total, math.sqrt(both / chance)], rel=1e-10)
    dense: dict[str, Update] = {m: DenseUpdate(update.dense()) for m, update in run.items()}
    assert shown(measured(dense, start, bases, top)) == pytest.approx(shown(view), rel=1e-9)


@pytest.mark.parametrize("change", ["gauge", "scale"])
def test_what_changes_nothing(change: str) -> None:
    """BG and G⁻¹A, and 3·ΔW: no value and no null changes."""
    run, start, bases = drawn()
    gauge = np.array([[2.0, 1, 0], [0, 1, 3], [0, 0, 0.5]])
    changed: dict[str, Update] = {}
    for module, update in run.items():
        assert isinstance(update, LoraUpdate)
        turned = LoraUpdate(update.b @ gauge, np.linalg.inv(gauge) @ update.a, update.scale)
        changed[module] = turned if change == "gauge" else 3.0 * update
    names = (*NAMES, *(f"{name}_null" for name in NAMES))
    before, after = (shown(measured(of, start, bases, 4), *names) for of in (run, changed))
    assert after == pytest.approx(before, rel=1e-9)


def test_what_is_not_known_is_empty() -> None:
    """Without W0 nothing is known; without the initial A the right null is not. A dense update may use all inputs."""
    run, _, bases = drawn()
    unknown = run_weights(
        ComparedWeights(list(run), list(SHAPES.values()), {"x": compare([run], list(run))[0][0]}, {}, 4)
    )
    assert np.isnan(shown(unknown, *NAMES, *(f"{name}_null" for name in NAMES))).all()
    weight = principal(bases["a"], 4)
    assert math.isnan(principal_parts(run["a"], None, weight).start_mean)
    parts = principal_parts(DenseUpdate(run["a"].dense()), None, weight)
    assert (parts.start_mean, parts.start_dimension) == (4 / 15, 15)


def frames(rng: np.random.Generator, draws: int, d: int, r: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((draws, d, r)))[0]


def test_variance_of_a_frame_by_hand() -> None:
    """A unit vector of the plane against a line: cos² has variance ⅛; both vectors of a basis in equal parts: 0."""
    one = np.ones(())
    assert frame_variance(one / 8, 2 * one, one) == pytest.approx(1 / 8)
    assert frame_variance(one / 8, 2 * one, one / 2) == 0
    assert frame_variance(0 * one, one, one) == 0
    # The beta law of cos² in three dimensions has (½, 1): 95% of it lie below the square of .95.
    assert beta_bound(one / 3, one * 4 / 45, one) == pytest.approx(0.95**2)
    assert beta_bound(one, 0 * one, one) == 1


@pytest.mark.parametrize(("modules", "rank", "k"), [(1, 3, 5), (8, 3, 5), (4, 1, 2)])
def test_left_null(modules: int, rank: int, k: int) -> None:
    """Of 6000 updates with random outputs 95 in 100 stay below the bound, shares and rotation alike."""
    rng, draws, out = np.random.default_rng(modules), 6000, 24
    values = np.sort(rng.uniform(0.3, 2, (modules, rank)))[:, ::-1]
    inputs = values[..., None] * frames(rng, modules, 12, rank).transpose(0, 2, 1)[..., :k]  # Σ·Qᵀ·V_k
    basis = np.stack([frames(rng, draws, out, rank) for _ in range(modules)], axis=1)[:, :, :k]  # U_kᵀ·P
    right = np.sum(inputs**2, axis=(1, 2))
    concentration = np.sum((inputs.transpose(0, 2, 1) @ inputs) ** 2, axis=(1, 2)) / right**2
    view = run_of(
        (draws, modules), [out] * modules, directions=[k] * modules,
        singular_values=np.broadcast_to(values, (draws, modules, rank)),
        left=np.sum((basis * values[:, None]) ** 2, axis=(2, 3)),
        right=np.broadcast_to(right, (draws, modules)),
        both=np.sum((basis @ inputs) ** 2, axis=(2, 3)),
        concentration=np.broadcast_to(concentration, (draws, modules)),
    )  # fmt: skip
    left = value_of("principal_left", view)
    assert left.mean() == pytest.approx(k / out, rel=0.01)
    assert np.mean(value_of("projected_rotation", view) ** 2) == pytest.approx(1, rel=0.02)
    for name in ("principal_left", "projected_rotation"):
        below = np.mean(value_of(name, view) < value_of(f"{name}_null", view))
        assert below == pytest.approx(0.95, abs=0.015), name


def test_right_null() -> None:
    """Of 4000 updates with random inputs within A's row space 95 in 100 stay below; A alone decides where that lies."""
    rng, draws, rank, into, k = np.random.default_rng(9), 4000, 4, 30, 6
    weights = {m: rng.standard_normal((20, into)) for m in "abcd"}
    starts: dict[str, Update] = {m: random_delta(rng, 20, into, rank) for m in weights}
    values = np.sort(rng.uniform(0.3, 2, (4, rank)))[:, ::-1]
    run: dict[str, Update] = {
        m: LoraUpdate(frames(rng, 1, 20, rank)[0] * values[n], starts[m].svd().right.T, 1.0)
        for n, m in enumerate(weights)
    }
    view = measured(run, starts, weights, k)
    bound = float(value_of("principal_right_null", view)[0])
    shares = np.zeros(draws)
    for n, (module, start) in enumerate(starts.items()):
        space = start.input_space()
        assert space is not None
        inside = principal(weights[module], k).right.T @ space @ frames(rng, draws, rank, rank)
        shares += np.sum((inside * values[n]) ** 2, axis=(1, 2)) / np.sum(values**2)
    assert np.mean(shares < bound) == pytest.approx(0.95, abs=0.015)
    mean = sum(
        np.sum(values[n] ** 2) / np.sum(values**2) * part
        for n, part in enumerate(
            principal_parts(run[m], starts[m].input_space(), principal(weights[m], k)).start_mean for m in weights
        )
    )
    assert shares.mean() == pytest.approx(mean, rel=0.01)
