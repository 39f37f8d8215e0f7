"""Effects on W0 beside those of rotated copies: by hand, densely, what does not change them, and their bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from losslens.measures.base_weights import principal
from losslens.measures.definitions.rotated import over_copies, over_copies_null
from losslens.measures.rotated import EFFECTS, against_copies, effects, rotated
from losslens.updates.base import Update
from losslens.updates.lora import LoraUpdate
from tests.measure_views import run_of
from tests.test_subspaces import random_delta
from tests.test_updates import DenseUpdate

pytestmark = pytest.mark.fast


def decaying(rng: np.random.Generator, out: int, into: int) -> np.ndarray:
    u, _, vt = np.linalg.svd(rng.standard_normal((out, into)), full_matrices=False)
    return u * 10 / np.arange(1, len(vt) + 1) @ vt


def test_by_hand() -> None:
    """W0 = diag(3, 2, 1), k = 1. ΔW = 2·e₂e₂ᵀ: σ₁ 3 → 4, the top direction e₁ → e₂ by 90°, one of nine entries changed.

    ΔW = .001·e₁e₁ᵀ changes an entry by a third of a thousandth of itself, so none.
    """
    weight, eye = np.diag([3.0, 2, 1]), np.eye(3)
    base = principal(weight, 1)
    turning = LoraUpdate(eye[:, [1]], eye[[1]], 2.0)
    assert effects(turning.svd(), weight, base) == pytest.approx([1, (np.pi / 2) ** 2, 8])
    small = LoraUpdate(eye[:, [0]], eye[[0]], 0.001)
    assert effects(small.svd(), weight, base) == pytest.approx([1e-6, 0, 9], abs=1e-12)
    assert not against_copies(0.0 * small, weight, base, 2, np.random.default_rng(0)).any()


def test_ratios_by_hand() -> None:
    """Effects 4 and 5 where copies have 2 and 1 in the mean: 3, its root for lengths.

    Variances 1 and 3 of four copies each: 4²/((1² + 3²)/3) = 4.8 degrees of freedom, so t is between 2.015 and 2.132;
    times √(4·1.25), over 3, above 1.
    """
    of_modules = [[4.0, 2, 1, 4], [5, 1, 3, 4]]
    run = run_of((1, 2), [4, 4], effects=[[[row] * 3 for row in of_modules]])
    assert over_copies(0, 1.0, run).item() == pytest.approx(3)
    assert over_copies(1, 0.5, run).item() == pytest.approx(np.sqrt(3))
    quantile = (over_copies_null(2, 1.0, run).item() - 1) * 3 / np.sqrt(5)
    assert quantile == pytest.approx(scipy.stats.t.ppf(0.95, 4.8), rel=1e-9)
    assert 2.015 < quantile < 2.132
    nothing = run_of((1, 1), [4], effects=np.zeros((1, 1, 3, 4)))
    for unknown in (nothing, run_of((1, 1), [4])):
        assert np.isnan([over_copies(0, 0.5, unknown).item(), over_copies_null(0, 0.5, unknown).item()]).all()


def test_equals_the_dense_computation() -> None:
    rng = np.random.default_rng(1)
    weight, update = decaying(rng, 20, 15), random_delta(rng, 20, 15, 3)
    u, values, _ = np.linalg.svd(weight)
    v, after, _ = np.linalg.svd(weight + update.dense())
    angles = np.arccos(np.clip(np.linalg.svd(u[:, :4].T @ v[:, :4], compute_uv=False), 0, 1))
    found = effects(update.svd(), weight, principal(weight, 4))
    assert found[:2] == pytest.approx([np.sum((after - values)[:4] ** 2), np.sum(angles**2)], rel=1e-9)
    tiny = 1e-3 * update
    pairs = zip((weight + tiny.dense()).flat, weight.flat, strict=True)
    same = sum(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs)
    assert effects(tiny.svd(), weight, principal(weight, 4))[2] == same
    assert 0 < same < weight.size


def test_a_copy_keeps_norm_spectrum_and_inputs() -> None:
    rng = np.random.default_rng(2)
    svd = random_delta(rng, 20, 15, 3).svd()
    copy = rotated(svd, rng)
    assert copy.left.T @ copy.left == pytest.approx(np.eye(3), abs=1e-12)
    assert np.array_equal(copy.values, svd.values)
    assert np.array_equal(copy.right, svd.right)


def test_what_changes_nothing() -> None:
    """BG and G⁻¹A, and the same matrix without factors; the copies are the same."""
    rng = np.random.default_rng(3)
    weight, update = decaying(rng, 20, 15), random_delta(rng, 20, 15, 3)
    gauge = np.array([[2.0, 1, 0], [0, 1, 3], [0, 0, 0.5]])
    same: list[Update] = [
        LoraUpdate(update.b @ gauge, np.linalg.inv(gauge) @ update.a, update.scale), DenseUpdate(update.dense()),
    ]  # fmt: skip
    expected, *found = (
        against_copies(of, weight, principal(weight, 4), 3, np.random.default_rng(0)) for of in [update, *same]
    )
    for other in found:
        # Singular vectors have free signs, which turn the frame: of the copies the law is the same, not each value.
        assert other[:, 0] == pytest.approx(expected[:, 0], rel=1e-7)
        assert other[:, 1] == pytest.approx(expected[:, 1], rel=0.5)


@pytest.mark.parametrize(("size", "names"), [(0.3, EFFECTS[:2]), (0.003, EFFECTS[2:])])
def test_bound_of_a_further_copy(size: float, names: tuple[str, ...]) -> None:
    """Of 3000 copies beside eight others, on 12 modules, 95 in 100 stay below (a large update changes all entries)."""
    rng = np.random.default_rng(4)
    pools = []
    for _ in range(12):
        weight, svd = decaying(rng, 24, 16), (size * random_delta(rng, 24, 16, 2)).svd()
        base = principal(weight, 4)
        pools.append([effects(rotated(svd, rng), weight, base) for _ in range(200)])
    drawn = np.stack([np.array(pool)[rng.integers(200, size=(3000, 9))] for pool in pools], axis=1)
    one, others = drawn[:, :, 0], drawn[:, :, 1:]
    copies = np.full(one.shape, 8)
    found = np.stack([one, others.mean(axis=2), others.var(axis=2, ddof=1), copies], axis=-1)
    run = run_of((3000, 12), [24] * 12, effects=found)
    for name in names:
        effect = EFFECTS.index(name)
        below = np.mean(over_copies(effect, 0.5, run) < over_copies_null(effect, 0.5, run))
        assert below == pytest.approx(0.95, abs=0.015), name
