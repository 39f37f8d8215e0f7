"""Unbiased CKA against an independent dense computation, by hand, and where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from losslens.measures.cka import cka, minibatch_sizes, minibatches_of, similarities, u_centred

pytestmark = pytest.mark.fast


def hsic1(k: np.ndarray, l: np.ndarray) -> float:
    """Song et al. 2012, equation 5, written out: [tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1/((n−1)(n−2)) − 2·1ᵀK̃L̃1/(n−2)]/(n(n−3))."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
    one = np.ones(n)
    total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 * one @ k @ l @ one / (n - 2)
    return total / (n * (n - 3))


def dense_cka(x: list[np.ndarray], y: list[np.ndarray]) -> float:
    """Of minibatches of features (n, d): summed, then divided once."""
    xy, xx, yy = (
        sum(hsic1(a @ a.T, b @ b.T) for a, b in zip(first, second, strict=True))
        for first, second in ((x, y), (x, x), (y, y))
    )
    return xy / np.sqrt(xx * yy)


def features(rng: np.random.Generator, layers: int, n: int, d: int) -> np.ndarray:
    return rng.standard_normal((layers, n, d)) + 3 * rng.standard_normal((layers, 1, d))


@pytest.mark.parametrize("sizes", [[40], [12, 9, 30], [4, 4]])
def test_equals_the_dense_computation(sizes: list[int]) -> None:
    """In one minibatch and in many, with offsets, in float64 to 1e-8."""
    rng = np.random.default_rng(0)
    x = [features(rng, 3, n, 6) for n in sizes]
    mixing = rng.standard_normal((6, 8))
    y = [batch @ mixing + 0.5 * features(rng, 3, batch.shape[1], 8) for batch in x]
    first, second = similarities(x), similarities(y)
    assert first.n == sum(sizes)
    found = cka(first.whole, second.whole)
    for layer in range(3):
        expected = dense_cka([batch[layer] for batch in x], [batch[layer] for batch in y])
        assert found[layer] == pytest.approx(expected, rel=1e-8)
    assert cka(first.whole, first.whole) == pytest.approx(np.ones(3))
    assert found == pytest.approx(cka(second.whole, first.whole), rel=1e-12)


def test_without_the_largest_outlier_dimension() -> None:
    """Dimension 2 swamps the base: CKA with it is 1, without it that of the other dimensions."""
    rng = np.random.default_rng(1)
    x, y = features(rng, 1, 30, 5), features(rng, 1, 30, 5)
    x[..., 2] *= 1e4
    y[..., 2] = x[..., 2]
    base = similarities([x])
    other = similarities([y], base.outliers)
    assert base.outliers.tolist() == other.outliers.tolist() == [2]
    assert cka(base.whole, other.whole)[0] == pytest.approx(1, abs=1e-4)
    rest = [0, 1, 3, 4]
    expected = dense_cka([x[0][:, rest]], [y[0][:, rest]])
    assert cka(base.without_outlier, other.without_outlier)[0] == pytest.approx(expected, rel=1e-8)


def test_independent_gaussians_give_about_zero() -> None:
    """64 sequences at d = 2560, where biased CKA reads .975: the mean of ten layers is 0 within ±.01, unclipped."""
    rng = np.random.default_rng(2)
    first, second = (similarities([rng.standard_normal((10, 64, 2560))]) for _ in range(2))
    found = cka(first.whole, second.whole)
    assert abs(found.mean()) < 0.01
    assert np.abs(found).max() < 0.08
    assert found.min() < 0 < found.max()


def test_what_changes_nothing() -> None:
    """A rotation, a factor, an offset of the features."""
    rng = np.random.default_rng(3)
    x, y = features(rng, 1, 20, 6), features(rng, 1, 20, 6)
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    base = cka(similarities([x]).whole, similarities([y]).whole)
    assert cka(similarities([-7 * x @ turn + 1e3]).whole, similarities([y]).whole) == pytest.approx(base, rel=1e-9)


def test_u_centring_by_hand() -> None:
    """Rows add up to 0, the diagonal is 0, and a constant off the diagonal vanishes; below four it is not defined."""
    gram = np.arange(25.0).reshape(5, 5)
    centred = u_centred(gram + gram.T)
    assert np.allclose(centred.sum(axis=0), 0)
    assert np.all(np.diag(centred) == 0)
    assert np.allclose(u_centred(np.ones((6, 6))), 0)
    with pytest.raises(ValueError, match="at least 4"):
        u_centred(np.ones((3, 3)))


def test_identical_features_have_no_similarity() -> None:
    same = similarities([np.ones((2, 8, 3))])
    assert np.isnan(cka(same.whole, same.whole)).all()


def test_rounding_is_no_similarity() -> None:
    """The same features in all sequences but for the last digit, as embeddings of one token have: not defined."""
    rng = np.random.default_rng(4)
    same = 1 + 1e-15 * rng.standard_normal((1, 8, 3))
    assert np.isnan(cka(similarities([same]).whole, similarities([features(rng, 1, 8, 3)]).whole)).all()


def test_minibatches_are_about_equal() -> None:
    """A short one would bring the noise of few sequences into the sum."""
    assert minibatch_sizes(128, 128) == [128]
    assert minibatch_sizes(133, 128) == [67, 66]
    assert minibatch_sizes(9, 4) == [5, 4]
    assert minibatch_sizes(7, 4) == [7]
    assert minibatch_sizes(4, 1000) == [4]
    for n in range(4, 60):
        sizes = minibatch_sizes(n, 10)
        assert sum(sizes) == n
        assert min(sizes) >= 4
        assert max(sizes) - min(sizes) <= 1


def test_minibatches_are_cut_from_parts() -> None:
    parts = [np.random.default_rng(n).standard_normal((2, n, 3)) for n in (5, 5, 1, 5, 7)]
    cut = list(minibatches_of(parts, [12, 4, 7]))
    assert [batch.shape[1] for batch in cut] == [12, 4, 7]
    assert np.array_equal(np.concatenate(cut, axis=1), np.concatenate(parts, axis=1))
