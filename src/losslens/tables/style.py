"""How things look: a colour a method, a look a loss, and the figure that all plots begin with."""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from losslens.losses.presentation import builtin_presentations, get_presentation

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from markupsafe import Markup

# LossLens's own losses, in their order, and their colours: of Petroff's ten (arXiv 2107.02270), of the palettes in use
# that can be read on paper and on a dark screen, those that stay farthest apart however a reader sees colours
# (tests/test_report_style.py).
METHODS = {name: known.colour for name, known in builtin_presentations().items()}
# Of losses that come without one.
_OTHERS = ("#94a4a2", "#228833", "#aa3377", "#4b4b8f")
# Of a cosine from −1 over 0 to 1 (Okabe and Ito 2008): two colours that nobody confuses.
AGAINST, ALONG = "#D55E00", "#0072B2"
# From this cosine on white can be read on its colour better than ink.
DARK = 0.87

# page.css says what these are, in the light and in the dark; page.js asks it.
INK = "var(--ink)"
MUTED = "var(--muted)"
PAPER = "var(--paper)"
GRID = "var(--grid)"
RULE = "var(--rule)"
SHADE = "rgba(128,128,128,0.28)"

# A shape as plotly and as matplotlib call it, and as a path in a box from −6 to 6.
_SHAPES = (
    ("circle", "o", "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z"),
    ("diamond", "D", "M0 -6L6 0L0 6L-6 0Z"),
    ("square", "s", "M-4.5 -4.5H4.5V4.5H-4.5Z"),
    ("triangle-up", "^", "M0 -5.5L5.5 4.5H-5.5Z"),
    ("triangle-down", "v", "M0 5.5L5.5 -4.5H-5.5Z"),
    ("cross", "P", "M-2 -5.5H2V-2H5.5V2H2V5.5H-2V2H-5.5V-2H-2Z"),
    ("pentagon", "p", "M0 -5.5L5.2 -1.7L3.2 4.5H-3.2L-5.2 -1.7Z"),
    ("star", "*", "M0 -6L1.5 -1.9L5.7 -1.9L2.3 0.7L3.5 4.9L0 2.4L-3.5 4.9L-2.3 0.7L-5.7 -1.9L-1.5 -1.9Z"),
    ("triangle-left", "<", "M-5.5 0L4.5 -5.5V5.5Z"),
    ("triangle-right", ">", "M5.5 0L-4.5 -5.5V5.5Z"),
    ("diamond-tall", "d", "M0 -6L3.5 0L0 6L-3.5 0Z"),
    ("hexagon", "h", "M0 -5.5L4.8 -2.8V2.8L0 5.5L-4.8 2.8V-2.8Z"),
)
# How a shape is filled: as plotly and as matplotlib call it.
_FILLINGS = (("", "full"), ("-open", "none"), ("-dot", "left"), ("-open-dot", "bottom"))
# Lengths, which plotly and SVG both read, and the same for matplotlib, which counts in widths of the line.
_DASHES: tuple[tuple[str, Any], ...] = (
    ("solid", "-"),
    ("9px,5px", (0, (4, 1.5))),
    ("2px,4px", (0, (1, 1.2))),
    ("9px,4px,2px,4px", (0, (4, 1.2, 1, 1.2))),
    ("16px,5px", (0, (8, 1.5))),
    ("16px,4px,2px,4px,2px,4px", (0, (6, 1.2, 1, 1.2, 1, 1.2))),
)


@dataclass(frozen=True)
class PlotStyle:
    """A loss, wherever it is drawn: told from the others by its colour, and by its mark or dashes without any colour.

    Attributes:
        colour: Of its method.
        shape: Of its mark.
        filling: Of its mark.
        dashes: Of its line.
    """

    colour: str
    shape: int
    filling: int
    dashes: int

    @property
    def symbol(self) -> str:
        """The mark, as plotly calls it."""
        return _SHAPES[self.shape][0] + _FILLINGS[self.filling][0]

    @property
    def dash(self) -> str:
        """The dashes, as plotly calls them."""
        return _DASHES[self.dashes][0]

    @property
    def marker(self) -> dict[str, Any]:
        """The mark, as matplotlib draws it."""
        return {
            "marker": _SHAPES[self.shape][1], "fillstyle": _FILLINGS[self.filling][1], "color": self.colour,
            "markerfacecoloralt": "white",
        }  # fmt: skip

    @property
    def linestyle(self) -> Any:
        """The dashes, as matplotlib calls them."""
        return _DASHES[self.dashes][1]

    def sample(self, line: bool) -> Markup:
        """Its mark, on its line where `line`, as an SVG for a key."""
        from markupsafe import Markup

        width, is_open = (44 if line else 16), self.filling % 2 == 1
        dashes = "" if self.dash == "solid" else f' stroke-dasharray="{self.dash.replace("px", "")}"'
        line_of = f'stroke="{self.colour}" stroke-width="2.2"{dashes}'
        below = f'<line x1="1" x2="43" y1="8" y2="8" {line_of}/>' if line else ""
        fill, edge, thick = ("none", self.colour, 1.6) if is_open else (self.colour, INK, 0.7)
        mark = f'<path d="{_SHAPES[self.shape][2]}" fill="{fill}" stroke="{edge}" stroke-width="{thick}"/>'
        dot = f'<circle r="1.6" fill="{self.colour if is_open else PAPER}"/>' if self.filling > 1 else ""
        return Markup(
            f'<svg width="{width}" height="16" viewBox="0 0 {width} 16" aria-hidden="true">{below}'
            f'<g transform="translate({width // 2} 8)">{mark}{dot}</g></svg>'
        )


class PlotStyles:
    """The look of each loss: those that are first of their method always have the same, wherever they are shown.

    No two have one mark, and so no two look alike without colour, as long as there are no more than 40 of them.

    Args:
        losses: Each loss and its method, in the order in which they are shown.
    """

    def __init__(self, losses: Iterable[tuple[str, str]] = ()) -> None:
        self._looks: dict[str, PlotStyle] = {}
        self._places = {method: place for place, method in enumerate(METHODS)}
        self._losses: dict[str, int] = {}
        for loss, method in losses:
            self.of(loss, method)

    def of(self, loss: str, method: str) -> PlotStyle:
        """The look of a loss; of one not seen before a new one."""
        if loss not in self._looks:
            place = self._places.setdefault(method, len(self._places))
            number = self._losses[method] = self._losses.get(method, -1) + 1
            self._looks[loss] = self._new(colour(method), place, number)
        return self._looks[loss]

    def _new(self, ink: str, place: int, number: int) -> PlotStyle:
        """Of the `number`th loss of a method: its shape with another filling, then other shapes."""
        taken = {(look.shape, look.filling) for look in self._looks.values()}
        taken |= {(first, 0) for first in range(len(METHODS)) if first != place or number}
        every = len(_SHAPES) * len(_FILLINGS)
        for step in range(number, number + every):
            turn, filling = divmod(step % every, len(_FILLINGS))
            shape = (place + 6 * turn + turn // 2) % len(_SHAPES)
            if (shape, filling) not in taken:
                break
        return PlotStyle(ink, shape, filling, (place + number) % len(_DASHES))


def colour(method: str) -> str:
    """The colour of a method, wherever it is shown."""
    return get_presentation(method).colour or _OTHERS[zlib.crc32(method.encode()) % len(_OTHERS)]


def loss_title(method: str) -> str:
    """`SFT`: what a text calls a method; one that nobody introduced keeps its name."""
    return get_presentation(method).title


def plot_order(method: str) -> float:
    """Where a method stands among others, wherever several are shown, least first."""
    place = get_presentation(method).place
    return float("inf") if place is None else place


def in_plot_order(methods: Iterable[str]) -> list[str]:
    """Each method once, in their order."""
    return sorted(dict.fromkeys(methods), key=plot_order)


def translucent(ink: str, share: float) -> str:
    """A colour, seen through."""
    red, green, blue = (int(ink[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def escape_markup(text: str) -> str:
    """`text` for a plot, where plotly would read markup."""
    return html.escape(text, quote=False)


def whisker(value: float, low: float, high: float, ink: str, thickness: float, width: int = 0) -> dict[str, Any]:
    """An error bar from `low` to `high`; none where they are not known."""
    known = not math.isnan(low + high)
    lengths = {"array": [high - value], "arrayminus": [value - low]} if known else {}
    return {**lengths, "visible": known, "color": ink, "thickness": thickness, "width": width}


def logarithmic(axis: str) -> dict[str, Any]:
    """The settings of a logarithmic axis whose ticks say their whole number."""
    ticks = [digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)]
    return {f"{axis}_type": "log", f"{axis}_tickvals": ticks, f"{axis}_ticktext": [f"{tick:g}" for tick in ticks]}


def figure(x: str, y: str, height: int) -> go.Figure:
    """An empty plot with its axes named."""
    import plotly.graph_objects as go  # colours alone are wanted without it, too

    axis: dict[str, Any] = {
        "gridcolor": GRID, "linecolor": RULE, "tickcolor": RULE, "zerolinecolor": RULE, "zeroline": False,
        "automargin": True, "ticks": "outside", "ticklen": 4,
    }  # fmt: skip
    return go.Figure(
        layout={
            "template": "none", "height": height, "margin": {"l": 48, "r": 16, "t": 8, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "xaxis": {**axis, "title": {"text": x, "standoff": 10}},
            "yaxis": {**axis, "title": {"text": y, "standoff": 8}}, "showlegend": False, "hovermode": "closest",
            "dragmode": False, "uirevision": "kept",
        }
    )  # fmt: skip


def rows_figure(x: str, labels: list[str], places: list[float], pixels: int = 22) -> go.Figure:
    """An empty plot of one row a label, the first on top."""
    plot = figure(x, "", height=int(70 + pixels * (max(places) + 1)))
    plot.update_yaxes(
        tickvals=places, ticktext=[escape_markup(label) for label in labels], range=[max(places) + 0.7, -0.7],
        showgrid=False, ticks="", title=None, showline=False,
    )  # fmt: skip
    plot.update_xaxes(nticks=5, tickangle=0)
    plot.update_layout(margin={"l": 8})
    return plot
