"""Formats numbers for readers; undefined values are a dash."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

NOTHING = "–"
# Most names listed in a sentence; longer lists are cut, with the number of the rest.
_MOST = 7


def number(value: float, digits: int = 3) -> str:
    """Formats `0.951`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:.{digits}f}")


def percent(value: float) -> str:
    """Formats a share as `57.6%`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:.1%}")


def difference(value: float) -> str:
    """Formats a difference of two shares as `+2.5%`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:+.1%}")


def points(value: float) -> str:
    """Formats a difference of two shares in percentage points, without unit: `+2.5`."""
    return NOTHING if pd.isna(value) else _signed(f"{100 * value:+.1f}")


def within(value: float) -> str:
    """Formats a margin as `±2.5%`."""
    return NOTHING if pd.isna(value) else f"±{value:.1%}"


def degrees(value: float) -> str:
    """Formats `17.7°`."""
    return NOTHING if pd.isna(value) else _signed(f"{value:.1f}°")


def p_value(value: float) -> str:
    """Formats a p-value as `0.047`; below .001 as `<0.001`, never as 0."""
    return "<0.001" if value < 0.001 else number(value)


def whole(value: float) -> str:
    """Formats an integer, also from a column that is float because of empty cells: `42`."""
    return NOTHING if pd.isna(value) else f"{value:.0f}"


def rate(value: float) -> str:
    """Formats a learning rate: `1e-3`, `2.5e-5`."""
    if pd.isna(value):
        return NOTHING
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def listed(names: Sequence[str]) -> str:
    """Joins names as `a, b and c`; a long list as its first names and the number of the rest."""
    if len(names) > _MOST:
        return f"{', '.join(names[:_MOST])} and {len(names) - _MOST} more"
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part) if names else ""


def _signed(text: str) -> str:
    return text.replace("-", "−")
