"""How things look: a colour a method, a mark a learning rate, and the figure that all plots begin with."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import Any

import plotly.graph_objects as go

# Okabe and Ito (2008): told apart whatever a reader's colour vision; legible on white and on black.
METHODS = {
    "sft": "#0072B2", "rft": "#56B4E9", "rift": "#009E73", "dft": "#CC79A7", "grpo": "#E69F00", "dpo": "#D55E00",
}  # fmt: skip
_OTHER = "#8C8C8C"
# Of a cosine from −1 over 0 to 1: of these two, too, the paper's colour lies between.
AGAINST, ALONG = METHODS["dpo"], METHODS["sft"]
# From this cosine on white can be read on its colour better than ink.
DARK = 0.87

# page.css says what these are, in the light and in the dark; page.js asks it.
INK = "var(--ink)"
MUTED = "var(--muted)"
PAPER = "var(--paper)"
GRID = "var(--grid)"
RULE = "var(--rule)"
SHADE = "rgba(128,128,128,0.28)"

_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "cross")
_GLYPHS = ("●", "◆", "■", "▲", "▼", "✚")
# Lengths, which plotly and SVG both read.
_DASHES = ("solid", "9px,5px", "2px,4px", "9px,4px,2px,4px", "16px,5px", "16px,4px,2px,4px")


def colour(method: str) -> str:
    """The colour of a method, wherever it is shown."""
    return METHODS.get(method, _OTHER)


def name_of(method: str) -> str:
    """`SFT`: what a text calls a method; a method that is not known here keeps its name."""
    return method.upper() if method in METHODS else method


def place_of(method: str) -> int:
    """Where a method stands among others, wherever several are shown; those not known here come last."""
    return list(METHODS).index(method) if method in METHODS else len(METHODS)


def in_order(methods: Iterable[str]) -> list[str]:
    """Each method once, in their order."""
    return sorted(dict.fromkeys(methods), key=place_of)


def translucent(method: str, share: float) -> str:
    """The colour of a method, seen through."""
    red, green, blue = (int(colour(method)[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


class Rates:
    """The learning rates of a section, the largest first, and the mark of each."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = sorted({value for value in values if value == value}, reverse=True)

    def symbol(self, value: float) -> str:
        """Of a point."""
        return _SYMBOLS[self._place(value)]

    def glyph(self, value: float) -> str:
        """The same in a text."""
        return _GLYPHS[self._place(value)]

    def dash(self, value: float) -> str:
        """Of a line."""
        return _DASHES[self._place(value)]

    def _place(self, value: float) -> int:
        return self.values.index(value) % len(_SYMBOLS) if value in self.values else 0


def safe(text: str) -> str:
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
    axis: dict[str, Any] = {
        "gridcolor": GRID, "linecolor": RULE, "tickcolor": RULE, "zerolinecolor": RULE, "zeroline": False,
        "automargin": True, "ticks": "outside", "ticklen": 4,
    }  # fmt: skip
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 48, "r": 16, "t": 8, "b": 44},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "xaxis": {**axis, "title": {"text": x, "standoff": 10}},
            "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
            "showlegend": False,
            "hovermode": "closest",
            "dragmode": False,
            "uirevision": "kept",
        }
    )


def rows_figure(x: str, labels: list[str], places: list[float], pixels: int = 22) -> go.Figure:
    """An empty plot of one row a label, the first on top."""
    plot = figure(x, "", height=int(70 + pixels * (max(places) + 1)))
    plot.update_yaxes(
        tickvals=places, ticktext=[safe(label) for label in labels], range=[max(places) + 0.7, -0.7], showgrid=False,
        ticks="", title=None, showline=False,
    )  # fmt: skip
    plot.update_xaxes(nticks=5, tickangle=0)
    plot.update_layout(margin={"l": 8})
    return plot
