"""Numbers as a reader wants them; what is not defined is a dash."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

NOTHING = "–"
# A list in a sentence is no table: what is longer is cut, and says so.
_MOST = 7


def number(value: float, digits: int = 3) -> str:
    """`0.951`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:.{digits}f}")


def percent(value: float) -> str:
    """`57.6%`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:.1%}")


def difference(value: float) -> str:
    """A difference of two percentages: `+2.5%`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:+.1%}")


def points(value: float) -> str:
    """A difference of two percentages without its unit: `+2.5` (percentage points)."""
    return NOTHING if pd.isna(value) else _signed(f"{100 * value:+.1f}")


def degrees(value: float) -> str:
    """`17.7°`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:.1f}°")


def p_value(value: float) -> str:
    """`0.047`, never 0."""
    return "<0.001" if value < 0.001 else number(value)


def whole(value: float) -> str:
    """`42`, also of a column that became fractional because some of its cells are empty."""
    return NOTHING if pd.isna(value) else f"{value:.0f}"


def rate(value: float) -> str:
    """A learning rate: `1e-3`, `2.5e-5`."""
    if pd.isna(value):
        return NOTHING
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`; of a long list the first, and how many more."""
    if len(names) > _MOST:
        return f"{', '.join(names[:_MOST])} and {len(names) - _MOST} more"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else ""


def _signed(text: str) -> str:
    return text.replace("-", "−")
