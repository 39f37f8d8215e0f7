"""Statistics of right and wrong answers."""

from __future__ import annotations

from statsmodels.stats.proportion import proportion_confint


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share of `right` in `n` (Wilson 1927)."""
    low, high = proportion_confint(right, n, alpha=0.05, method="wilson")
    return float(low), float(high)
