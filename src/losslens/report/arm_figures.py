"""The figures of the learning-rate-matched comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from losslens.measures import Measure, PairMeasure, get_measure, pair_measures, run_measures
from losslens.report.arm_table import lines_below
from losslens.report.components import Figure
from losslens.tables.format import difference, number, percent
from losslens.tables.style import (
    INK,
    MUTED,
    SHADE,
    PlotStyles,
    colour,
    escape_markup,
    figure,
    logarithmic,
    rows_figure,
    translucent,
    whisker,
)

_LEVEL = "the ceiling or repeat level, which the two would show if they were the same loss"
_NULL = "which two updates with nothing in common would show"

# Pairs of columns that are drawn against each other, with title and caption.
_TRADE_OFFS = (
    ("kl", "accuracy", "Accuracy and KL to the base", "What is gained for how far the outputs have moved."),
    ("kl", "off_task_kl", "Change on the task and off it", "How far the outputs have moved on the task and elsewhere."),
)

# Smallest range of an axis of barriers, most of which are 0.
_SMALLEST_BARRIER = 0.01


def arm_figures(arms: pd.DataFrame, looks: PlotStyles, base: pd.Series | None) -> list[Figure]:
    """Draws all figures for which the table has values.

    Args:
        arms: One row per arm.
        looks: The plot styles of the page's losses.
        base: The untrained base on the same benchmark; None if it was not scored.
    """
    figures = []
    if (arms["norm"].gt(0) & arms["cosine_to_sft"].notna()).any():
        figures.append(_size_and_direction(arms, looks))
    if arms["accuracy"].notna().any():
        figures.append(_accuracy(arms, looks, base))
    figures += [_trade_off(arms, looks, base, *plot) for plot in _TRADE_OFFS if _both(arms, *plot[:2]).any()]
    panels: list[tuple[str, str, Measure]] = [
        *((f"{m.name}_to_sft", f"{m.heading} to SFT", m) for m in pair_measures("main") if m.name != "cosine"),
        *((m.name, m.label, m) for m in run_measures("more") if m.name != "norm"),
    ]
    return figures + [_panel(arms, looks, *panel) for panel in panels if arms[panel[0]].notna().any()]


def _size_and_direction(arms: pd.DataFrame, looks: PlotStyles) -> Figure:
    plot = figure("‖ΔW‖ (log)", "cosine to SFT", height=420)
    shown = arms[arms["norm"].gt(0) & arms["cosine_to_sft"].notna()]
    smallest, largest = math.log10(shown["norm"].min()), math.log10(shown["norm"].max())
    room = 0.05 * max(largest - smallest, 1)
    plot.update_layout(**logarithmic("xaxis"), xaxis_range=[smallest - room, largest + room])
    nulls = shown[shown["cosine_to_sft_null"].notna()]
    if len(nulls):
        plot.add_scatter(
            x=nulls["norm"].tolist(), y=[0] * len(nulls), mode="markers", marker={"size": 1, "color": SHADE},
            hoverinfo="skip",
            error_y={"array": nulls["cosine_to_sft_null"].tolist(), "thickness": 12, "width": 0, "color": SHADE},
        )  # fmt: skip
    plot.add_hline(y=0, line={"color": MUTED, "width": 1})
    # The repeats of the SFT arms that the others are compared with.
    repeats = shown.loc[shown["arm"] == shown["sft"], "cosine_repeat"].dropna()
    for value in repeats:
        plot.add_hline(y=value, line={"color": INK, "width": 1.5, "dash": "dash"})
    for _, arm in shown.iterrows():
        plot.add_scatter(
            x=[arm["norm"]], y=[arm["cosine_to_sft"]], error_x=_spread(arm, "norm"),
            error_y=_spread(arm, "cosine_to_sft"), cliponaxis=False,
            **_mark(arm, looks, _hover(arm, "cosine_to_sft", number)),
        )  # fmt: skip
    line = f" Dashed: the repeat of {'SFT' if len(repeats) == 1 else 'each SFT arm'}." if len(repeats) else ""
    bars = f" Grey bars: the null (95%), {_NULL}." if len(nulls) else ""
    return Figure(
        "Size and direction",
        "Each mark is an arm; the lines through it show the standard deviation of its size and the range of its "
        f"cosines.{line}{bars}",
        plot,
        wide=True,
    )


def _accuracy(arms: pd.DataFrame, looks: PlotStyles, base: pd.Series | None) -> Figure:
    plot = rows_figure("accuracy", arms["beside"].tolist(), arms["place"].tolist())
    plot.update_xaxes(tickformat=".0%")
    if base is not None:
        plot.add_vline(x=base["accuracy"], line={"color": INK, "width": 1.5, "dash": "dot"})
    for _, arm in arms[arms["accuracy"].notna()].iterrows():
        accuracy = arm["accuracy"]
        point = {"x": [accuracy], "y": [arm["place"]]}
        interval = whisker(
            accuracy, arm["ci_low"], arm["ci_high"], translucent(colour(arm["method"]), 0.35), thickness=10
        )
        seeds = whisker(accuracy, arm["accuracy_min"], arm["accuracy_max"], INK, thickness=1.5, width=4)
        for bar in (interval, seeds) if arm["seeds"] > 1 else (interval,):
            plot.add_scatter(
                **point, error_x=bar, mode="markers", marker={"size": 1, "color": bar["color"]}, hoverinfo="skip",
                meta=arm["arm"],
            )  # fmt: skip
        to_base = "" if pd.isna(arm["base_diff"]) else f"<br>vs base {difference(arm['base_diff'])}"
        hover = f"{_hover(arm, 'accuracy', percent)}{to_base} {escape_markup(arm['base_verdict'])}"
        plot.add_scatter(**point, **_mark(arm, looks, hover))
    line = " Dotted: the untrained base." if base is not None else ""
    lost = arms["diverged"].any() or arms["collapsed"].any()
    crosses = " ✕: runs of this arm diverged or collapsed; see the notes." if lost else ""
    return Figure(
        "Accuracy",
        f"Wide bar: 95% interval over problems. Thin line: from the worst to the best seed.{line}{crosses}",
        plot,
        wide=True,
    )


def _both(arms: pd.DataFrame, x: str, y: str) -> pd.Series:
    return arms[x].notna() & arms[y].notna()


def _trade_off(
    arms: pd.DataFrame, looks: PlotStyles, base: pd.Series | None, x: str, y: str, title: str, caption: str
) -> Figure:
    """Draws two numbers of each arm against each other; the base, which has not moved, stands at an x of 0."""
    titles = {name: get_measure(name).title for name in (x, y) if name != "accuracy"}
    plot = figure(titles[x], titles.get(y, "accuracy"), height=420)
    plot.update_xaxes(rangemode="tozero")
    if y == "accuracy":
        plot.update_yaxes(tickformat=".0%")
    at_base = (None if base is None else base["accuracy"]) if y == "accuracy" else 0.0
    if at_base is not None:
        plot.add_scatter(
            x=[0], y=[at_base], mode="markers", hoverinfo="text", hovertext=["the untrained base"], cliponaxis=False,
            marker={"symbol": "cross-thin", "size": 12, "line": {"color": INK, "width": 2}},
        )  # fmt: skip
    show = percent if y == "accuracy" else get_measure(y).show
    for _, arm in arms[_both(arms, x, y)].iterrows():
        hover = f"{_hover(arm, y, show)}<br>{escape_markup(titles[x])}: {get_measure(x).show(arm[x])}"
        plot.add_scatter(
            x=[arm[x]], y=[arm[y]], error_x=_spread(arm, x), error_y=_spread(arm, y), cliponaxis=False,
            **_mark(arm, looks, hover),
        )  # fmt: skip
    return Figure(title, f"{caption} Cross: the untrained base. Lines: spread over seeds.", plot, wide=True)


def _panel(
    arms: pd.DataFrame,
    looks: PlotStyles,
    name: str,
    title: str,
    measure: Measure,
) -> Figure:
    axis = measure.heading if isinstance(measure, PairMeasure) else measure.label
    axis += f" ({measure.unit})" * (measure.unit not in ("", "%"))
    plot = rows_figure(axis, arms["beside"].tolist(), arms["place"].tolist())
    level = next((f"{name}_{end}" for end in ("ceiling", "repeat") if _known(arms, f"{name}_{end}")), "")
    shown = [*arms[name], *arms.get(level, [])]
    if measure.unit == "%":
        plot.update_xaxes(tickformat=".0%")
    if isinstance(measure, PairMeasure):
        if measure.kind == "distance" and max(value for value in shown if value == value) < _SMALLEST_BARRIER:
            # If all are 0, plotly would show −1 to 1 even with `autorangeoptions_include`.
            plot.update_xaxes(range=[-_SMALLEST_BARRIER / 20, _SMALLEST_BARRIER * 1.05])
        else:
            plot.update_xaxes(autorangeoptions_include=[measure.identical])
    for _, arm in arms[arms[name].notna()].iterrows():
        mark = _mark(arm, looks, _hover(arm, name, measure.show))
        plot.add_scatter(x=[arm[name]], y=[arm["place"]], error_x=_spread(arm, name), **mark)
    # Drawn over the marks, so that a mark at its level stays visible as such.
    tick = {"symbol": "line-ns", "size": 13, "line": {"color": INK, "width": 2.5}}
    null = {"symbol": "circle-open", "size": 6, "color": MUTED}
    captions = []
    for column, marker, meaning in (
        (level, tick, f"Vertical tick: {_LEVEL}."),
        (f"{name}_null", null, f"Small circle: the null, {_NULL}."),
    ):
        if _known(arms, column):
            known = arms[arms[column].notna()]
            plot.add_scatter(
                x=known[column].tolist(), y=known["place"].tolist(), mode="markers", hoverinfo="skip", marker=marker
            )
            captions.append(meaning)
    return Figure(
        f"{title[0].upper()}{title[1:]}", " ".join(captions) or "Mean and standard deviation over runs.", plot
    )


def _mark(arm: pd.Series, looks: PlotStyles, hover: str) -> dict[str, Any]:
    look = looks.of(arm["arm"], arm["method"])
    return {
        "mode": "markers", "hoverinfo": "text", "hovertext": [hover], "meta": arm["arm"],
        "marker": {
            "color": look.colour, "size": 11, "symbol": look.symbol, "line": {"color": INK, "width": 0.7},
        },
    }  # fmt: skip


def _spread(arm: pd.Series, name: str) -> dict[str, Any]:
    """Returns error bars: the standard deviation over runs or, for pair measures, the range over pairs of runs."""
    std = arm.get(f"{name}_std", math.nan)
    low, high = arm.get(f"{name}_min", arm[name] - std), arm.get(f"{name}_max", arm[name] + std)
    return whisker(arm[name], low, high, colour(arm["method"]), thickness=1.5, width=3)


def _known(arms: pd.DataFrame, column: str) -> bool:
    return column in arms and bool(arms[column].notna().any())


def _hover(arm: pd.Series, name: str, show: Callable[[float], str]) -> str:
    std = "" if pd.isna(arm.get(f"{name}_std")) else f" ± {show(arm[f'{name}_std'])}"
    lines = [f"<br>{line}" for line in lines_below(arm, name, show)]
    return (
        f"<b>{escape_markup(arm['label'])}</b> ({escape_markup(arm['lr'])})<br>{show(arm[name])}{std}{''.join(lines)}"
    )
