"""Labels of a matplotlib figure that lie on each other or are cut off."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text


def faults(figure: Figure) -> list[str]:
    """A sentence for each label that is cut off, and for each two that lie on each other; the figure must be drawn."""
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    ticks = {
        text for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks) for text in (tick.label1, tick.label2)
    }
    # Axes keep labels of ticks that lie outside of them.
    ticks -= {text for axis in axes for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    texts = [text for text in texts if text not in ticks and (text.axes is None or _drawn(text))]
    corners = {text: _corners(text) for text in texts}
    width, height = figure.bbox.width, figure.bbox.height
    found = [
        f'"{text.get_text()}" is cut off'
        for text, box in corners.items()
        if (box < -1).any() or (box[:, 0] > width + 1).any() or (box[:, 1] > height + 1).any()
    ]
    pairs = itertools.combinations(corners.items(), 2)
    return found + [f'"{a.get_text()}" lies on "{b.get_text()}"' for (a, one), (b, other) in pairs if _meet(one, other)]


def _drawn(text: Text) -> bool:
    """Whether the axes of a text draw it: those switched off draw their own texts only."""
    return text.axes.axison or text in text.axes.texts or text in (text.axes.title, text.axes._left_title)


def _corners(text: Text) -> np.ndarray:
    """The four corners of a text, as it is turned, a little inside of its box."""
    turned = text.get_window_extent()
    centre, angle = np.array([(turned.x0 + turned.x1) / 2, (turned.y0 + turned.y1) / 2]), text.get_rotation()
    text.set_rotation(0)
    flat = text.get_window_extent()
    text.set_rotation(angle)
    half = np.array([flat.width / 2 - 0.5, 0.38 * flat.height])
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    turn = np.radians(angle)
    return centre + corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])


def _meet(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two rectangles have a point in common: no side of either separates them."""
    for box in (one, other):
        for side in (box[1] - box[0], box[3] - box[0]):
            a, b = one @ side, other @ side
            if a.max() <= b.min() or b.max() <= a.min():
                return False
    return True
