"""How a figure for a paper looks, and how it is written: of a column's width, with fonts that can be read and kept.

No pyplot, whose figures and backend are the whole process'; a figure here belongs to nobody else, and the settings are
those of this file only while it is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from losslens.files import atomic_file
from losslens.report.comparison import Loss
from losslens.report.numbers import rate
from losslens.report.style import METHODS, colour, name_of

# Of one column and of both, in most venues; inches.
COLUMN, PAGE = 3.25, 6.75
INK, MUTED, GRID, SHADE = "#1b1f24", "#5b6470", "#e6e8eb", "#d9dce0"
SMALL = 7.0
# A line of more points than these is no row of marks.
_MOST_MARKED = 12
# Told apart without their colour.
_MARKERS = ("o", "D", "s", "^", "v", "P")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)))

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "legend.fontsize": SMALL,
    "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "axes.linewidth": 0.6, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "xtick.color": INK, "ytick.color": INK, "grid.color": GRID, "grid.linewidth": 0.6,
    "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False, "legend.handlelength": 1.6,
    "legend.columnspacing": 1.0, "legend.handletextpad": 0.5, "legend.borderaxespad": 0.2,
    "pdf.fonttype": 42, "ps.fonttype": 42,  # TrueType, which publishers ask for
    "figure.constrained_layout.h_pad": 0.03, "figure.constrained_layout.w_pad": 0.03, "savefig.dpi": 300,
    "savefig.facecolor": "white", "figure.facecolor": "white", "axes.facecolor": "white", "axes.unicode_minus": True,
    "text.usetex": False, "savefig.bbox": None,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """The settings of all figures, for as long as they are drawn and written."""
    with matplotlib.rc_context(_STYLE):
        yield


def figure(width: float = COLUMN, height: float = 2.2) -> Figure:
    """An empty figure, of a size in inches."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn


def write(drawn: Figure, folder: Path, name: str) -> list[Path]:
    """Writes `name.pdf` and `name.png`; the same figure is the same bytes."""
    files = []
    for kind, metadata in (("pdf", {"Creator": "LossLens", "Producer": None, "CreationDate": None}), ("png", {})):
        file = folder / f"{name}.{kind}"
        with atomic_file(file) as temporary:
            drawn.savefig(temporary, format=kind, metadata={**metadata} or {"Software": "LossLens"})
        files.append(file)
    return files


def marker(rates: Sequence[float], value: float) -> str:
    """The mark of a learning rate among `rates`, the largest first."""
    return _MARKERS[rates.index(value) % len(_MARKERS)] if value in rates else _MARKERS[0]


def dash(rates: Sequence[float], value: float) -> Any:
    """The same of a line."""
    return _DASHES[rates.index(value) % len(_DASHES)] if value in rates else _DASHES[0]


def rates_of(losses: Sequence[Loss]) -> list[float]:
    """Their learning rates, the largest first; none where no method has several, and there is nothing to tell apart."""
    if len({loss.method for loss in losses}) == len({(loss.method, loss.learning_rate) for loss in losses}):
        return []
    return sorted({loss.learning_rate for loss in losses if loss.learning_rate == loss.learning_rate}, reverse=True)


def line_of(loss: Loss, losses: Sequence[Loss], points: int = 0) -> dict[str, Any]:
    """How the line of a loss among `losses` is drawn: its colour says the method, its dashes the learning rate.

    Args:
        loss: The loss.
        losses: All that are drawn.
        points: How many the line has; few are marked.
    """
    alike = [each for each in losses if (each.method, each.learning_rate) == (loss.method, loss.learning_rate)]
    own = alike.index(loss) % len(_MARKERS)
    mark = _MARKERS[own] if len(alike) > 1 else "." if points <= _MOST_MARKED else ""
    return {
        "color": colour(loss.method), "linestyle": dash(rates_of(losses), loss.learning_rate), "label": loss.name,
        "marker": mark, "markersize": 3, "markevery": max(1, points // _MOST_MARKED),
    }  # fmt: skip


def key(losses: Sequence[Loss]) -> list[Line2D]:
    """What colours and dashes mean; of losses that differ in more than method and rate each by its name."""
    rates, methods = rates_of(losses), list(dict.fromkeys(loss.method for loss in losses))
    pairs = {(loss.method, loss.learning_rate) for loss in losses}
    if len(losses) <= len(methods) or len(pairs) < len(losses) or "adapter" in methods:
        lines = [line_of(loss, losses, points=_MOST_MARKED + 1) for loss in losses]
        return [Line2D([], [], **{**line, "markevery": None}) for line in lines]
    methods.sort(key=lambda method: list(METHODS).index(method) if method in METHODS else len(METHODS))
    handles = [Line2D([], [], color=colour(method), label=name_of(method)) for method in methods]
    return handles + [Line2D([], [], color=MUTED, linestyle=dash(rates, each), label=rate(each)) for each in rates]


def legend_above(drawn: Figure, handles: Sequence[Line2D]) -> None:
    """The key, above all axes, row by row."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = 4 if longest < 8 else 3 if longest < 13 else 2 if longest < 25 else 1
    drawn.set_figheight(drawn.get_figheight() + 0.15 * max(0, -(-len(handles) // columns) - 2))
    drawn.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def logarithmic(axes: Axes, name: str, values: Iterable[float]) -> None:
    """Makes the axis `name`, x or y, a logarithmic one whose ticks say their whole number."""
    known = [value for value in values if value > 0]
    low, high = min(known) / 1.25, max(known) * 1.25
    digits = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [digit * 10.0**power for power in range(-12, 6) for digit in digits]
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def upright(axes: Axes) -> None:
    """A light grid against which a value is read off the y axis."""
    axes.grid(axis="y")


def rows(axes: Axes, names: Sequence[str], places: Sequence[float]) -> None:
    """One row a name, the first on top."""
    axes.set_yticks(list(places), list(names))
    axes.set_ylim(max(places) + 0.6, min(places) - 0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
