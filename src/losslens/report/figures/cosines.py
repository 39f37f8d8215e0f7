"""The cosine matrix: every two losses, and on the diagonal each with itself in another order of the data."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from losslens.report.comparison import Comparison
from losslens.report.figures.canvas import COLUMN, INK, MUTED, PAGE, SMALL, figure
from losslens.report.folder import AnalysisFolder
from losslens.report.style import AGAINST, ALONG, DARK

_MOST_WITH_THREE, _MOST_WITH_NUMBERS = 14, 26


def draw(_: AnalysisFolder, comparison: Comparison) -> Figure | None:
    """The figure; None with fewer than two losses."""
    losses = comparison.losses
    if len(losses) < 2:
        return None
    count = len(losses)
    wide = count > 7  # three digits of 7 points need 0.35 inches
    digits = 3 if count <= _MOST_WITH_THREE else 2
    names = [loss.name for loss in losses]
    level = max(map(len, names)) < 5
    drawn = figure(PAGE if wide else COLUMN, 0.9 + 0.3 * (not level) + count * (0.3 if wide else 0.36))
    axes = drawn.add_subplot()
    values = [[comparison.average("cosine", a, b) for b in losses] for a in losses]
    colours = LinearSegmentedColormap.from_list("cosine", [AGAINST, "#ffffff", ALONG]).with_extremes(bad="#ffffff")
    axes.imshow([[average.value for average in row] for row in values], cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, average in enumerate(row):
            text = _text(average.value, digits) if count <= _MOST_WITH_NUMBERS else ""
            style: dict[str, Any] = {"fontstyle": "italic"} if x == y else {}
            ink = "white" if average.value > DARK else INK if average.known else MUTED
            axes.text(x, y, text, ha="center", va="center", fontsize=SMALL, color=ink, **style)
    for place in range(count):
        box = Rectangle((place - 0.47, place - 0.47), 0.94, 0.94)
        box.set(fill=False, linestyle=":", linewidth=0.8, edgecolor=INK)
        axes.add_patch(box)
    axes.set_xticks(range(count), names, rotation=0 if level else 40, ha="center" if level else "left")
    axes.xaxis.tick_top()
    axes.set_yticks(range(count), names)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for edge in range(1, count):
        axes.axhline(edge - 0.5, color="white", linewidth=1)
        axes.axvline(edge - 0.5, color="white", linewidth=1)
    axes.set_xlabel(_below(comparison), fontsize=SMALL, color=MUTED, loc="left")
    return drawn


def _text(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("0.", ".", 1).replace("-", "−")


def _below(comparison: Comparison) -> str:
    """What the diagonal is, and what unrelated updates show."""
    losses = comparison.losses
    nulls = [comparison.average("cosine", a, b).null for a in losses for b in losses if a is not b]
    nulls = [null for null in nulls if not math.isnan(null)]
    lines = ["Diagonal: same loss, other order of the data."]
    if nulls:
        lines.append(f"Unrelated updates: |cosine| < {_text(max(nulls))} (95%).")
    return "\n".join(lines)
