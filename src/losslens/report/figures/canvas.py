"""Style and output of figures for papers: one column wide, with readable, embedded fonts.

Avoids pyplot, whose figures and backend are global to the process; settings apply only while a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from losslens.core.files import atomic_file
from losslens.report.loss_comparison import ComparedLoss
from losslens.tables.style import PlotStyles

# Widths of one column and of a page in most venues, in inches.
COLUMN, PAGE = 3.25, 6.75
INK, MUTED, GRID, SHADE = "#1b1f24", "#5b6470", "#e6e8eb", "#d9dce0"
SMALL = 7.0
# Width of a 7-point letter, in inches.
LETTER = 0.065
# Most points of a line that are all marked.
_MOST_MARKED = 12

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so figures look the same everywhere
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "axes.linewidth": 0.6, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "xtick.color": INK, "ytick.color": INK, "grid.color": GRID, "grid.linewidth": 0.6,
    "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False, "legend.handlelength": 2.6,
    "legend.columnspacing": 1.0, "legend.handletextpad": 0.5, "legend.borderaxespad": 0.2,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # TrueType, as publishers require
    "figure.constrained_layout.h_pad": 0.03, "figure.constrained_layout.w_pad": 0.03, "savefig.dpi": 300,
    "savefig.facecolor": "white", "figure.facecolor": "white", "axes.facecolor": "white", "axes.unicode_minus": True,
    "text.usetex": False, "savefig.bbox": None,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Applies the settings of all figures while they are drawn and written."""
    with matplotlib.rc_context(_STYLE):
        yield


class _Shown(Figure):
    """A figure that a notebook shows, which has no pyplot to ask."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        with style():
            self.savefig(content, format="png", dpi=150)
        return content.getvalue()


def figure(width: float = COLUMN, height: float = 2.2) -> Figure:
    """Creates an empty figure; sizes are in inches."""
    drawn = _Shown(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def write(drawn: Figure, folder: Path, name: str) -> list[Path]:
    """Writes `name.pdf` and `name.png`, reproducibly to the byte."""
    files = []
    for kind, metadata in (("pdf", {"Creator": "LossLens", "Producer": None, "CreationDate": None}), ("png", {})):
        file = folder / f"{name}.{kind}"
        with atomic_file(file) as temporary:
            drawn.savefig(temporary, format=kind, metadata={**metadata} or {"Software": "LossLens"})
        files.append(file)
    return files


def line_of(loss: ComparedLoss, looks: PlotStyles, points: int = 0) -> dict[str, Any]:
    """Returns the matplotlib style of the line of a loss.

    Args:
        loss: The loss.
        looks: The plot styles of all losses.
        points: Number of points of the line; if there are many, only some are marked.
    """
    look = looks.of(loss.arm, loss.method)
    return {
        **look.marker, "linestyle": look.linestyle, "label": loss.name, "markersize": 3.5, "markeredgewidth": 0.7,
        "markevery": max(1, points // _MOST_MARKED),
    }  # fmt: skip


def point_of(loss: str, method: str, looks: PlotStyles) -> dict[str, Any]:
    """Returns the matplotlib style of the mark of a loss."""
    look = looks.of(loss, method)
    edge = look.colour if look.marker["fillstyle"] == "none" else INK
    return {**look.marker, "markeredgecolor": edge, "markeredgewidth": 0.6, "markersize": 5}


def key(losses: Sequence[ComparedLoss], looks: PlotStyles) -> list[Line2D]:
    """Returns legend handles with the line and mark of each loss."""
    return [Line2D([], [], **{**line_of(loss, looks), "markevery": None}) for loss in losses]


def legend_above(drawn: Figure, handles: Sequence[Line2D]) -> None:
    """Adds the legend above all axes, in as many columns as fit, and makes room for it."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    # Sample and gaps take 0.45 inches.
    columns = max(1, int(drawn.get_figwidth() / (0.45 + LETTER * longest)))
    drawn.set_figheight(drawn.get_figheight() + 0.15 * max(0, -(-len(handles) // columns) - 2))
    drawn.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def logarithmic(axes: Axes, name: str, values: Iterable[float]) -> None:
    """Makes the axis `name` (x or y) logarithmic, with ticks labelled in plain numbers."""
    known = [value for value in values if value > 0]
    low, high = min(known) / 1.25, max(known) * 1.25
    digits = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [digit * 10.0**power for power in range(-12, 6) for digit in digits]
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def lines(text: str, inches: float) -> str:
    """Wraps an 8-point label to a width."""
    return fill(text, max(8, int(inches / 0.075)), break_long_words=False)


def upright(axes: Axes) -> None:
    """Adds a light grid for reading values off the y axis."""
    axes.grid(axis="y")


def rows(axes: Axes, names: Sequence[str], places: Sequence[float]) -> None:
    """Labels one row per name, the first on top."""
    axes.set_yticks(list(places), list(names))
    axes.set_ylim(max(places) + 0.6, min(places) - 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
