"""Plot styles: a colour per method, a style per loss, and the base layout of all plots."""

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

# Colours of the built-in losses, in their order. From Petroff's ten (arXiv 2107.02270), of the common palettes that are
# legible on paper and on dark screens, these stay farthest apart under colour vision deficiencies
# (tests/test_report_style.py).
METHODS = {name: known.colour for name, known in builtin_presentations().items()}
# Colours of losses that define none.
_OTHERS = ("#94a4a2", "#228833", "#aa3377", "#4b4b8f")
# Colours of cosines −1 and 1 (Okabe and Ito 2008), distinguishable with any colour vision.
AGAINST, ALONG = "#D55E00", "#0072B2"
# Above this cosine, white text is more legible on its colour than ink.
DARK = 0.87

# Defined in page.css for light and dark mode; page.js resolves them.
INK = "var(--ink)"
MUTED = "var(--muted)"
PAPER = "var(--paper)"
GRID = "var(--grid)"
RULE = "var(--rule)"
SHADE = "rgba(128,128,128,0.28)"

# Shapes: name in plotly, name in matplotlib, and SVG path in a box from −6 to 6.
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
# Fillings of a shape: plotly suffix, matplotlib fillstyle.
_FILLINGS = (("", "full"), ("-open", "none"), ("-dot", "left"), ("-open-dot", "bottom"))
# Dashes: lengths for plotly and SVG, and the same for matplotlib in units of the line width.
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
    """The plot style of a loss, distinguishable by colour and, without colour, by mark or dashes.

    Attributes:
        colour: The colour of its method.
        shape: Index of the shape of its mark.
        filling: Index of the filling of its mark.
        dashes: Index of the dashes of its line.
    """

    colour: str
    shape: int
    filling: int
    dashes: int

    @property
    def symbol(self) -> str:
        """The mark in plotly."""
        return _SHAPES[self.shape][0] + _FILLINGS[self.filling][0]

    @property
    def dash(self) -> str:
        """The dashes in plotly."""
        return _DASHES[self.dashes][0]

    @property
    def marker(self) -> dict[str, Any]:
        """The mark in matplotlib."""
        return {
            "marker": _SHAPES[self.shape][1], "fillstyle": _FILLINGS[self.filling][1], "color": self.colour,
            "markerfacecoloralt": "white",
        }  # fmt: skip

    @property
    def linestyle(self) -> Any:
        """The dashes in matplotlib."""
        return _DASHES[self.dashes][1]

    def sample(self, line: bool) -> Markup:
        """Returns the mark, on its line if `line` is true, as an SVG for a legend."""
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


# The first built-in losses, in the order in which they got their marks: further ones take none from them.
_FIRST_MARKED = ("sft", "rft", "rift", "dft", "p_alpha", "grpo", "dpo", "simpo", "kto")


class PlotStyles:
    """Assigns plot styles to losses; the first loss of a built-in method always gets the same one.

    Up to 40 losses get different marks, so all can be distinguished without colour.

    Args:
        losses: Each loss and its method, in display order.
    """

    def __init__(self, losses: Iterable[tuple[str, str]] = ()) -> None:
        shown = list(losses)
        self._styles: dict[str, PlotStyle] = {}
        self._places = {method: place for place, method in enumerate(dict.fromkeys([*_FIRST_MARKED, *METHODS]))}
        self._losses: dict[str, int] = {}
        # The marks of the first losses of the methods shown, which no other loss gets.
        self._reserved = {_first_mark(self._places[method]) for _, method in shown if method in METHODS}
        for loss, method in shown:
            self.of(loss, method)

    def of(self, loss: str, method: str) -> PlotStyle:
        """Returns the style of a loss; a new loss gets a new style."""
        if loss not in self._styles:
            place = self._places.setdefault(method, len(self._places))
            number = self._losses[method] = self._losses.get(method, -1) + 1
            self._styles[loss] = self._new(colour(method), place, number)
        return self._styles[loss]

    def _new(self, ink: str, place: int, number: int) -> PlotStyle:
        """Makes the style of the `number`th loss of a method: its shape with another filling, then other shapes."""
        first = _first_mark(place)
        taken = {(style.shape, style.filling) for style in self._styles.values()}
        taken |= self._reserved - ({first} if number == 0 else set())
        count = len(_SHAPES) * len(_FILLINGS)
        for step in range(number, number + count):
            turn, filling = divmod(step % count, len(_FILLINGS))
            shape = (first[0] + 6 * turn + turn // 2) % len(_SHAPES)
            if (mark := (shape, (first[1] + filling) % len(_FILLINGS))) not in taken:
                break
        return PlotStyle(ink, *mark, (place + number) % len(_DASHES))


def _first_mark(place: int) -> tuple[int, int]:
    """Shape and filling of the first loss of the method at `place`."""
    filling, shape = divmod(place, len(_SHAPES))
    return shape, filling % len(_FILLINGS)


def colour(method: str) -> str:
    """Returns the colour of a method."""
    return get_presentation(method).colour or _OTHERS[zlib.crc32(method.encode()) % len(_OTHERS)]


def loss_title(method: str) -> str:
    """Returns the title of a method, such as `SFT`; an unknown method keeps its name."""
    return get_presentation(method).title


def plot_order(method: str) -> float:
    """Returns the position of a method among others, smallest first."""
    place = get_presentation(method).place
    return float("inf") if place is None else place


def in_plot_order(methods: Iterable[str]) -> list[str]:
    """Sorts methods into display order, without duplicates."""
    return sorted(dict.fromkeys(methods), key=plot_order)


def translucent(ink: str, share: float) -> str:
    """Returns a colour with an opacity of `share`."""
    red, green, blue = (int(ink[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def escape_markup(text: str) -> str:
    """Escapes text for plotly, which interprets some markup."""
    return html.escape(text, quote=False)


def whisker(value: float, low: float, high: float, ink: str, thickness: float, width: int = 0) -> dict[str, Any]:
    """Returns an error bar from `low` to `high`; invisible if they are unknown."""
    known = not math.isnan(low + high)
    lengths = {"array": [high - value], "arrayminus": [value - low]} if known else {}
    return {**lengths, "visible": known, "color": ink, "thickness": thickness, "width": width}


def logarithmic(axis: str) -> dict[str, Any]:
    """Returns the settings of a logarithmic axis with ticks labelled in plain numbers."""
    ticks = [digit * 10.0**power for power in range(-6, 6) for digit in (1, 2, 5)]
    return {f"{axis}_type": "log", f"{axis}_tickvals": ticks, f"{axis}_ticktext": [f"{tick:g}" for tick in ticks]}


def figure(x: str, y: str, height: int) -> go.Figure:
    """Creates an empty plot with axis titles."""
    import plotly.graph_objects as go  # the colours above are used without plotly, too

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
    """Creates an empty plot with one row per label, the first on top."""
    plot = figure(x, "", height=int(70 + pixels * (max(places) + 1)))
    plot.update_yaxes(
        tickvals=places, ticktext=[escape_markup(label) for label in labels], range=[max(places) + 0.7, -0.7],
        showgrid=False, ticks="", title=None, showline=False,
    )  # fmt: skip
    plot.update_xaxes(nticks=5, tickangle=0)
    plot.update_layout(margin={"l": 8})
    return plot
