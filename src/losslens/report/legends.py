"""Legend of a section: its losses, each with its mark."""

from __future__ import annotations

from collections.abc import Iterable

from losslens.losses.presentation import get_presentation
from losslens.report.components import Key, Keyed
from losslens.report.loss_comparison import LossComparison
from losslens.tables.style import PlotStyles


def legend(losses: Iterable[tuple[str, str, str]], looks: PlotStyles, lines: bool) -> Key:
    """Builds the legend of some losses.

    Args:
        losses: Arm, method and displayed name of each loss.
        looks: The plot styles of the page's losses.
        lines: True if the losses are drawn as lines, not marks.
    """
    return Key(
        [
            Keyed(loss, name, get_presentation(method).summary, looks.of(loss, method).sample(lines))
            for loss, method, name in losses
        ]
    )


def legend_of(comparison: LossComparison, shown: Iterable[str], lines: bool) -> Key:
    """Builds the legend of the compared losses whose arms are in `shown`."""
    arms = set(shown)
    losses = [(loss.arm, loss.method, loss.name) for loss in comparison.losses if loss.arm in arms]
    return legend(losses, comparison.looks, lines)
