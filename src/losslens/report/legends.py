"""The key of a section: its losses, each with its mark."""

from __future__ import annotations

from collections.abc import Iterable

from losslens.losses.presentation import get_presentation
from losslens.report.components import Key, Keyed
from losslens.report.loss_comparison import Comparison
from losslens.tables.style import PlotStyles


def legend(losses: Iterable[tuple[str, str, str]], looks: PlotStyles, lines: bool) -> Key:
    """The key of some losses.

    Args:
        losses: Name in the tables, method, and what a reader calls it, of each.
        looks: Of the losses of the page.
        lines: Whether they are lines.
    """
    return Key(
        [
            Keyed(loss, name, get_presentation(method).summary, looks.of(loss, method).sample(lines))
            for loss, method, name in losses
        ]
    )


def legend_of(comparison: Comparison, shown: Iterable[str], lines: bool) -> Key:
    """The key of those of the losses compared that are `shown`."""
    wanted = set(shown)
    found = [(loss.arm, loss.method, loss.name) for loss in comparison.losses if loss.arm in wanted]
    return legend(found, comparison.looks, lines)
