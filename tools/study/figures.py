"""Figures of the study, from its results alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from losslens.report.figures.canvas import (
    COLUMN,
    INK,
    MUTED,
    PAGE,
    SHADE,
    SMALL,
    figure,
    lines,
    logarithmic,
    rows,
    style,
    write,
)
from losslens.tables.style import ALONG, loss_title
from tools.study.findings import BY_DESIGN, CANNOT_TELL, FAILS, FINDINGS, HOLDS, Finding
from tools.study.geometry import INTRUDER, TOP, UNCHANGED
from tools.study.hypotheses import LOGARITHMIC, SUITE

_SHARES = {
    "common": ("any loss, any data", "#9aa3ad"), "loss": ("the loss's", "#0072B2"), "data": ("the data's", "#D55E00"),
    "loss_and_data": ("this loss on these data", "#E69F00"), "order": ("the order of the data", "#e6e8eb"),
}  # fmt: skip
_VERDICTS = {HOLDS: "#0072B2", FAILS: "#f2b48c", CANNOT_TELL: "#e6e8eb", BY_DESIGN: "#ffffff"}
KIND_TITLES = {
    "weights": "weights", "inputs": "weights, by inputs", "function": "outputs", "kl": "outputs, by KL",
    "activations": "activations", "behaviour": "answers that flip",
}  # fmt: skip
MEASURE_TITLES = {
    "unchanged": f"bf16 sparsity (relative change below {UNCHANGED:g})",
    "spectral_shift": f"shift of the top {TOP} singular values",
    "rotation": f"rotation of the top {TOP} directions, °", "small_overlap": "largest changes on smallest weights",
    "principal_left": f"share in W0's top {TOP} directions", "intruders": f"intruders (cosine below {INTRUDER})",
}  # fmt: skip


def shares(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws the shares of an update for each kind of similarity, as stacked bars.

    Args:
        tables: `hypotheses.share_table` by what it is of.
    """
    drawn = figure(PAGE, 0.5 + 0.32 * len(tables))
    axes = drawn.add_subplot()
    places = np.arange(len(tables), dtype=float)
    start = np.zeros(len(tables))
    for name, (title, colour) in _SHARES.items():
        values = np.array([table.set_index("share").at[name, "value"] for table in tables.values()])
        axes.barh(places, np.maximum(values, 0), left=start, height=0.62, color=colour, label=title, edgecolor="white")
        for place, left, value in zip(places, start, values, strict=True):
            if value > 0.045:
                ink = "white" if name in ("loss", "data") else INK
                axes.text(left + value / 2, place, f"{value:.0%}", ha="center", va="center", fontsize=7, color=ink)
        start = start + np.maximum(values, 0)
    rows(axes, list(tables), list(places))
    axes.set_xlim(0, 1)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{tick:.0%}" for tick in np.linspace(0, 1, 6)])
    axes.set_xlabel("share of an update from one initial adapter")
    drawn.legend(loc="outside upper center", ncols=len(_SHARES))
    return drawn


def persistence(pairs: pd.DataFrame, title: str, named: Collection[str] = ()) -> Figure:
    """Draws the similarity of every two losses on two draws of the data over that on one (`hypotheses.pair_table`).

    Args:
        pairs: The pairs of losses.
        title: What the similarities are of.
        named: Losses whose similarity with themselves is labelled.
    """
    drawn = figure(COLUMN, COLUMN)
    axes = drawn.add_subplot()
    one = pairs["loss_a"] == pairs["loss_b"]
    axes.axhline(0, color=SHADE, linewidth=0.6)
    axes.axvline(0, color=SHADE, linewidth=0.6)
    axes.plot([-1, 1], [-1, 1], color=MUTED, linewidth=0.8, label="all persists")
    axes.plot([-1, 1], [-0.5, 0.5], color=MUTED, linewidth=0.8, linestyle="--", label="half persists")
    axes.plot(pairs["same"][~one], pairs["other"][~one], "o", color=ALONG, markersize=2.5, label="two losses")
    axes.plot(pairs["same"][one], pairs["other"][one], "D", color="#D55E00", markersize=3.5, label="one loss")
    for own in pairs[one & pairs["loss_a"].isin(named)].itertuples():
        at, below = (own.same, own.other), (3, -7)
        axes.annotate(loss_title(own.loss_a), at, below, textcoords="offset points", fontsize=SMALL, ha="center")
    low = min(-0.2, float(pairs[["same", "other"]].min().min()) - 0.05)
    axes.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
    axes.set_xlabel("cosine on one draw of the data")
    axes.set_ylabel("cosine on two draws")
    axes.set_title(title, loc="left")
    axes.legend(loc="upper left")
    return drawn


def decided(gradients: np.ndarray, ends: np.ndarray, r: float, title: str) -> Figure:
    """Draws the final cosine of every two losses over that of their gradients before step 1, (L, L) each.

    Args:
        gradients: Cosines of gradients.
        ends: Cosines of updates.
        r: Their correlation.
        title: What the similarities are of.
    """
    drawn = figure(COLUMN, COLUMN)
    axes = drawn.add_subplot()
    upper = np.triu_indices(len(gradients), 1)
    axes.plot([-1, 1], [-1, 1], color=MUTED, linewidth=0.8, label="equal")
    axes.plot(gradients[upper], ends[upper], "o", color=ALONG, markersize=2.5, label="two losses")
    low = min(-0.2, float(np.nanmin([gradients[upper], ends[upper]])) - 0.05)
    axes.set(xlim=(low, 1.02), ylim=(low, 1.02), aspect="equal")
    axes.set_xlabel("cosine of gradients before step 1")
    axes.set_ylabel("cosine of updates at the end")
    axes.set_title(
        f"{title}: {np.isfinite(gradients + ends)[upper].sum()} pairs,\naverages over draws and starts: r = {r:.3f}",
        loc="left",
    )
    axes.legend(loc="upper left")
    return drawn


def norm_in_disguise(runs: pd.DataFrame, explained: pd.DataFrame) -> Figure:
    """Draws each measure of the geometry suite over ‖ΔW‖, with the means of rotated copies (`geometry.geometry`)."""
    measures = (*SUITE, "principal_left")
    drawn = figure(PAGE, 3.6)
    r2 = explained.set_index("measure")["r2"]
    rates = sorted(set(runs["learning_rate"]))
    colours = dict(zip(rates, colormaps["viridis"](np.linspace(0, 0.85, len(rates))), strict=True))
    for place, measure in enumerate(measures):
        axes = drawn.add_subplot(2, 3, place + 1)
        copies = "principal_left_chance" if measure == "principal_left" else f"{measure}_copies"
        for rate, own in runs.groupby("learning_rate"):
            axes.plot(own["norm"], own[measure], "o", color=colours[rate], markersize=2.2)
        axes.plot(runs["norm"], runs[copies], "_", color=INK, markersize=4, markeredgewidth=0.5)
        logarithmic(axes, "x", runs["norm"])
        if measure in LOGARITHMIC:
            logarithmic(axes, "y", pd.concat([runs[measure], runs[copies]]))
        of_logs = " (of logarithms)" * (measure in LOGARITHMIC)
        axes.set_title(f"{MEASURE_TITLES[measure]}\nR² = {r2[measure]:.3f}{of_logs}", loc="left", fontsize=7)
        axes.set_xlabel("‖ΔW‖")
    axes = drawn.add_subplot(2, 3, 6)
    axes.axis("off")
    for rate, colour in colours.items():
        axes.plot([], [], "o", color=colour, markersize=2.2, label=f"a run at learning rate {rate:g}")
    axes.plot([], [], "_", color=INK, markersize=4, markeredgewidth=0.5, label="its rotated copies, or chance")
    axes.legend(loc="center left")
    return drawn


def behaviour(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws KL ÷ ‖ΔW‖² of each loss over the median of the pointwise losses (`hypotheses.behaviour_per_norm`).

    Of several draws each is a dot, and the interval is over draws; of one draw it is over orders. The marks of a loss
    stand one below the other.

    Args:
        tables: By what is held equal, such as "conventional rates".
    """
    first = next(iter(tables.values()))
    losses = list(first["loss"])
    drawn = figure(COLUMN, 1.2 + 0.19 * len(losses))
    axes = drawn.add_subplot()
    places = {loss: float(place) for place, loss in enumerate(losses)}
    values = []
    for (what, table), mark, below in zip(tables.items(), ("o", "D", "s"), (-0.22, 0.0, 0.22), strict=False):
        known = table[table["loss"].isin(losses)]
        at = [places[loss] + below for loss in known["loss"]]
        colour = ALONG if mark == "o" else INK
        dots = [
            (x, place) for place, own in zip(at, known["by_draw"], strict=True) for x in own.values() if len(own) > 1
        ]
        if dots:
            axes.plot(*zip(*dots, strict=True), ".", color=colour, markersize=2, alpha=0.6)
        around = np.nan_to_num(np.abs(known[["low", "high"]].to_numpy().T - known["ratio"].to_numpy()))
        values += list(known["low"].fillna(known["ratio"])) + list(known["high"].fillna(known["ratio"]))
        axes.errorbar(known["ratio"], at, xerr=around, fmt=mark, color=colour, markersize=3, linewidth=0.5, label=what,
                      markerfacecolor="white" if mark == "s" else colour)  # fmt: skip
        values += [*known["ratio"], *(x for x, _ in dots)]
    rows(axes, [loss_title(loss) for loss in losses], list(places.values()))
    logarithmic(axes, "x", values)
    axes.axvline(1, color=MUTED, linewidth=0.6)
    axes.set_xlabel(lines("KL ÷ ‖ΔW‖², over the median of SFT, RFT, DFT, RIFT and GRPO", 2.5))
    if len(tables) > 1:
        drawn.legend(loc="outside upper left")
    return drawn


def matchings(judged: Mapping[str, Mapping[str, Finding]]) -> Figure:
    """Draws which findings hold under which matching."""
    drawn = figure(PAGE, 0.6 + 0.3 * len(judged))
    axes = drawn.add_subplot()
    for row, found in enumerate(judged.values()):
        for column, one in enumerate(found[name] for name in FINDINGS):
            colour = _VERDICTS[one.verdict]
            axes.add_patch(Rectangle((column - 0.48, row - 0.44), 0.96, 0.88, color=colour))
            ink = "white" if one.verdict == HOLDS else INK
            axes.text(column, row, one.verdict, ha="center", va="center", fontsize=SMALL, color=ink)
    axes.set_xlim(-0.5, len(FINDINGS) - 0.5)
    rows(axes, list(judged), [float(row) for row in range(len(judged))])
    axes.grid(visible=False)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.set_xticks(range(len(FINDINGS)), [lines(f"{name}: {text}", 1.0) for name, text in FINDINGS.items()])
    for side in ("bottom", "top"):
        axes.spines[side].set_visible(False)
    return drawn


def save(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Writes figures as PDF and PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        for name, one in drawn.items():
            write(one, folder, name)
