from __future__ import annotations

import math

import pytest

from losslens.statistics import wilson_interval


def test_wilson_interval() -> None:
    """(p + z²/2n ± z·√(p(1 − p)/n + z²/4n²))/(1 + z²/n) for 15 of 100, z = 1.959964."""
    z, p, n = 1.959964, 0.15, 100
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert wilson_interval(15, 100) == pytest.approx(expected, abs=1e-6)


def test_wilson_interval_at_the_ends() -> None:
    """0 of 10: from 0 to z²/(n + z²) = 0.2775."""
    assert wilson_interval(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1), abs=1e-5)
