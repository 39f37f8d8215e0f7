"""Figure of the cosine matrix: every two losses, and on the diagonal the repeat of each."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from losslens.report.figures.canvas import COLUMN, INK, LETTER, MUTED, PAGE, SMALL, figure, lines
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import AGAINST, ALONG, DARK

_MOST_WITH_THREE = 14
# Widths of a 7-point number with three and with two digits, in inches.
_THREE, _TWO = 0.35, 0.33
# Smallest readable font size, in points.
_SMALLEST = 5.0


def draw(_: AnalysisFolder, comparison: LossComparison) -> Figure | None:
    """Draws the figure; None with fewer than two losses."""
    losses = comparison.losses
    if len(losses) < 2:
        return None
    count = len(losses)
    names = [loss.name for loss in losses]
    beside = LETTER * max(map(len, names)) + 0.1
    wide = (COLUMN - beside) / count < _THREE
    cell = ((PAGE if wide else COLUMN) - beside) / count
    digits = 3 if count <= _MOST_WITH_THREE and cell >= _THREE else 2
    size = SMALL * min(1.0, cell / _TWO)
    level = max(map(len, names)) < 5
    drawn = figure(PAGE if wide else COLUMN, 0.9 + 0.6 * beside * (not level) + count * (0.3 if wide else 0.36))
    axes = drawn.add_subplot()
    values = [[comparison.of("cosine", a, b) for b in losses] for a in losses]
    colours = LinearSegmentedColormap.from_list("cosine", [AGAINST, "#ffffff", ALONG]).with_extremes(bad="#ffffff")
    axes.imshow([[average.value for average in row] for row in values], cmap=colours, vmin=-1, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, average in enumerate(row):
            text = _text(average.value, digits) if size >= _SMALLEST else ""
            style: dict[str, Any] = {"fontstyle": "italic"} if x == y else {}
            ink = "white" if average.value > DARK else INK if average.known else MUTED
            axes.text(x, y, text, ha="center", va="center", fontsize=size, color=ink, **style)
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
    below = "\n".join(lines(line, cell * count + 0.3) for line in _below(comparison))
    axes.set_xlabel(below, fontsize=SMALL, color=MUTED, loc="left")
    return drawn


def _text(value: float, digits: int = 3) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("0.", ".", 1).replace("-", "−")


def _below(comparison: LossComparison) -> list[str]:
    """Returns the notes below the matrix, on its diagonal and the null."""
    losses = comparison.losses
    nulls = [comparison.of("cosine", a, b).null for a in losses for b in losses if a is not b]
    nulls = [null for null in nulls if not math.isnan(null)]
    again = any(comparison.of("cosine", loss, loss).known for loss in losses)
    notes = ["Diagonal: same loss, trained again (repeat)."] * again
    if nulls:
        notes.append(f"Unrelated updates: |cosine| < {_text(max(nulls))} (95%).")
    return notes
