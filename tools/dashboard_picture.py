"""Draws the W&B dashboard of an analysed sweep to a PNG file: `python tools/dashboard_picture.py sweep=main`.

Its panels are drawn from the same local files that are sent to W&B; no network access is needed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from losslens.cli.key_values import KeyValueParser
from losslens.core.errors import InputError
from losslens.core.files import atomic_file
from losslens.report.figures.canvas import INK, MUTED, SHADE, figure, style, upright
from losslens.report.names import all_cut, loss_name
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.style import PlotStyle, PlotStyles, plot_order
from losslens.tracking.logged_sweep import LoggedRun, LoggedSweep, logged_sweep
from losslens.tracking.panels import CHARTS, Panel, Section, sections

LABEL = "drawn by LossLens from the same data, not a screenshot of W&B"
# Panels per row and height of a row in inches, by kind of panel, where they differ from the defaults.
_PER_ROW = {"table": 2, "figures": 1}
_HEIGHTS = {"table": 1.45, "figures": 2.6}
_DEFAULT_HEIGHT = 1.7
_WIDTH, _HEAD, _TITLE, _MARGIN = 15.0, 0.75, 0.4, 0.15
# Space for the labels of a panel in inches: left, right, above, below.
_PADDING = (0.45, 0.1, 0.3, 0.25)
_DPI = 100
_MAX_ROWS, _MAX_COLUMNS, _MAX_CHARACTERS = 5, 7, 24


def main(arguments: list[str]) -> int:
    """Draws the picture and returns the exit status: 0, or 2 for invalid input."""
    parser = KeyValueParser(
        {"sweep": "main", "output_dir": "outputs", "file": "docs/wandb.png"},
        "sweep=main, output_dir=outputs, file=docs/wandb.png",
        prog="dashboard_picture.py",
        description="Draws the dashboard that launch/wandb_dashboard.py creates on W&B.",
    )
    settings, _ = parser.parse(arguments)
    output_dir, name, file = (settings[key] for key in ("output_dir", "sweep", "file"))
    try:
        draw(logged_sweep(Path(output_dir), name), Path(output_dir) / name / "analysis", Path(file))
    except InputError as error:
        print(f"dashboard_picture.py: {error}", file=sys.stderr)
        return 2
    print(file)
    return 0


def draw(sweep: LoggedSweep, folder: Path, file: Path) -> None:
    """Draws the picture and saves it as PNG.

    Args:
        sweep: The logged sweep.
        folder: Folder of its analysis.
        file: Path of the PNG file.

    Raises:
        InputError: The analysis does not exist, or one of its tables is damaged.
    """
    picture = _Picture(sweep, AnalysisFolder(folder))
    with style(), atomic_file(file) as temporary:
        canvas = FigureCanvasAgg(picture.drawn())
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        # A third of the size, without a visible difference.
        pixels.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE).save(
            temporary, "png", optimize=True
        )


class _Picture:
    def __init__(self, sweep: LoggedSweep, analysis: AnalysisFolder) -> None:
        self.sweep, self.analysis = sweep, analysis
        self.reference = str(analysis.manifest.get("reference"))
        self.scores = analysis.table("runs", ("run", "method", "benchmark"), ("accuracy", "ci_low", "ci_high"))
        arms = sorted(sweep.arms, key=lambda arm: plot_order(arm[0]))
        self.arms = [[run for run in sweep.runs if sweep.values(run) == arm] for arm in arms]
        looks = PlotStyles((str(place), runs[0].method) for place, runs in enumerate(self.arms))
        self.looks = [looks.of(str(place), runs[0].method) for place, runs in enumerate(self.arms)]
        self.names = all_cut([self._name(runs[0]) for runs in self.arms])
        # Numbers instead of names below bars if the names, at 0.06 inches per letter, do not fit side by side.
        self.numbered = 0.06 * (max(map(len, self.names), default=0) + 2) * len(self.names) > _WIDTH / 4 - sum(
            _PADDING[:2]
        )

    def _name(self, run: LoggedRun) -> str:
        """Name of a run's loss, with the settings in which runs of the same loss differ."""
        same_method = [other for other in self.sweep.runs if other.method == run.method]
        several_rates = len({other.learning_rate for other in same_method}) > 1
        values = zip(self.sweep.settings, self.sweep.values(run), strict=True)
        differ = [key for key in self.sweep.settings if len({str(other.config.get(key)) for other in same_method}) > 1]
        settings = " ".join(f"{key}={value}" for key, value in values if key in differ and not key.startswith("lr."))
        return loss_name(run.method, run.learning_rate if several_rates else math.nan, settings)

    def _look(self, run: LoggedRun) -> PlotStyle:
        return next(look for look, runs in zip(self.looks, self.arms, strict=True) if run in runs)

    def drawn(self) -> Figure:
        """Draws the sections, one below the other."""
        shown = [(section, list(_rows(section))) for section in sections(self.sweep)]
        columns = max(1, int(0.6 * _WIDTH / (0.8 + 0.09 * max(map(len, self.names), default=0))))
        head = max(_HEAD, 0.2 + 0.2 * -(-len(self.names) // columns))
        height = head + sum(_TITLE + sum(map(_height, rows)) for _, rows in shown)
        drawn = figure(_WIDTH, height)
        drawn.set_dpi(_DPI)
        drawn.set_layout_engine("none")

        def place(left: float, top: float, width: float, high: float) -> Axes:
            return drawn.add_axes((left / _WIDTH, 1 - (top + high) / height, width / _WIDTH, high / height))

        self._head(place(_MARGIN, 0.1, _WIDTH - 2 * _MARGIN, head - 0.1), columns)
        top = head
        for section, rows in shown:
            _bar(place(_MARGIN, top + 0.06, _WIDTH - 2 * _MARGIN, _TITLE - 0.14), section)
            top += _TITLE
            for row in rows:
                wide = (_WIDTH - 2 * _MARGIN) / _PER_ROW.get(row[0].kind, 4)
                left, right, above, below = _PADDING
                for number, panel in enumerate(row):
                    axes = place(
                        _MARGIN + number * wide + left, top + above,
                        wide - left - right, _height(row) - above - below,
                    )  # fmt: skip
                    axes.set_title(panel.title, loc="left", fontsize=8, pad=4)
                    self._panel(axes, panel)
                top += _height(row)
        return drawn

    def _head(self, axes: Axes, columns: int) -> None:
        axes.axis("off")
        inch = 1 / axes.get_window_extent().height * _DPI
        axes.text(0, 1, f"LossLens {self.sweep.name}", fontsize=15, fontweight="bold", va="top")
        axes.text(0, 1 - 0.42 * inch, LABEL[0].upper() + LABEL[1:], fontsize=10, va="top", color=MUTED)
        handles = [
            Line2D([], [], **look.marker, linestyle=look.linestyle, label=f"{place} {name}" if self.numbered else name)
            for place, (look, name) in enumerate(zip(self.looks, self.names, strict=True), start=1)
        ]
        axes.legend(handles=handles, loc="upper right", ncols=columns, fontsize=10)

    def _panel(self, axes: Axes, panel: Panel) -> None:
        match panel.kind:
            case "lines":
                shown = self._lines(axes, *panel.names)
            case "bars":
                shown = self._bars(axes, panel.names)
            case "points":
                shown = self._points(axes, *panel.names)
            case "table":
                shown = self._table(axes, panel.names[0].removeprefix("tables/"))
            case "chart":
                shown = self._chart(axes, *panel.names)
            case "figures":
                shown = self._figures(axes, panel.names)
            case "page":
                shown = _note(axes, "report.html, as written by analyze.py")
        if not shown:
            _note(axes, "no data yet")

    def _lines(self, axes: Axes, name: str) -> bool:
        """Draws the mean of each arm, with a band from its smallest to its largest run."""
        for look, runs in zip(self.looks, self.arms, strict=True):
            rows = [(step["step"], step[name]) for run in runs for step in run.steps if name in step]
            if rows:
                by_step = pd.DataFrame(rows, columns=["step", "value"]).groupby("step")["value"]
                mean = by_step.mean()
                axes.fill_between(mean.index, by_step.min(), by_step.max(), color=look.colour, alpha=0.15, linewidth=0)
                _line(axes, mean.index, mean, look)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        upright(axes)
        return bool(axes.lines)

    def _bars(self, axes: Axes, names: Sequence[str]) -> bool:
        for place, runs in enumerate(self.arms):
            for number, name in enumerate(names):
                values = [value for run in runs if not math.isnan(value := self._end(run, name))]
                if values:
                    wide = 0.8 / len(names)
                    mean, at = float(np.mean(values)), place + (number - (len(names) - 1) / 2) * wide
                    ink = self.looks[place].colour
                    axes.bar(at, mean, wide, color=ink, alpha=1 if name == names[-1] else 0.6)
                    if len(values) > 1:
                        axes.plot([at, at], [min(values), max(values)], color=INK, linewidth=1)
        labels = [str(place) for place in range(1, len(self.arms) + 1)] if self.numbered else self.names
        axes.set_xticks(range(len(self.arms)), labels)
        upright(axes)
        return bool(axes.patches)

    def _points(self, axes: Axes, x: str, y: str) -> bool:
        for run in self.sweep.runs:
            at = [self._end(run, name) for name in (x, y)]
            if not np.isnan(at).any():
                look = self._look(run)
                edge = look.colour if look.marker["fillstyle"] == "none" else INK
                axes.plot(*at, **look.marker, linestyle="", markeredgecolor=edge, markeredgewidth=0.5, markersize=6)
        axes.set_xlabel("‖ΔW‖", fontsize=7, labelpad=1)
        axes.grid()
        return bool(axes.lines)

    def _table(self, axes: Axes, name: str) -> bool:
        """Draws the first rows and columns of a table."""
        axes.axis("off")
        columns = self.analysis.columns(name)
        rows = self.analysis.table(name, columns, ())
        if rows.empty:
            return False
        shown = rows.iloc[:_MAX_ROWS, :_MAX_COLUMNS].map(_short)
        widths = [max(map(len, [name, *shown[name]])) + 2 for name in shown]
        drawn = axes.table(
            shown.to_numpy().tolist(), colLabels=[*shown], colWidths=[width / sum(widths) for width in widths],
            loc="upper left", cellLoc="left", colLoc="left", edges="B",
        )  # fmt: skip
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        for cell in drawn.get_celld().values():
            cell.set(edgecolor=SHADE, height=0.85 / (_MAX_ROWS + 1))
        size = f"{len(rows)} rows, {len(columns)} columns"
        axes.text(1, 1.01, size, transform=axes.transAxes, ha="right", va="bottom", fontsize=7, color=MUTED)
        return True

    def _chart(self, axes: Axes, name: str) -> bool:
        """Draws the curves of all pairs with the reference, each in the colour of the other run."""
        _, x, y = CHARTS[name]
        rows = self.analysis.table(name, ("run_a", "run_b"), (x, y))
        runs = {run.name: run for run in self.sweep.runs}
        for (a, b), curve in rows[(rows["run_a"] == self.reference) | (rows["run_b"] == self.reference)].groupby(
            ["run_a", "run_b"]
        ):
            other = b if a == self.reference else a
            along = curve[x] if x != "alpha" or a == self.reference else 1 - curve[x]
            if other in runs:  # not the base
                _line(axes, along, curve[y], self._look(runs[other]))
        axes.set_xlabel({"alpha": "α, from the reference (0) to the other run (1)"}.get(x, x), fontsize=7, labelpad=1)
        upright(axes)
        return bool(axes.lines)

    def _figures(self, axes: Axes, names: Sequence[str]) -> bool:
        """Shows the figures of the analysis side by side."""
        files = [file for name in names if (file := self.analysis.path / f"{name}.png").exists()]
        axes.axis("off")
        box = axes.get_window_extent()
        axes.set(xlim=(0, box.width / box.height), ylim=(0, 1))
        for place, image in enumerate(map(imread, files)):
            room = box.width / box.height / len(files)
            high = min(1, 0.95 * room * image.shape[0] / image.shape[1])
            left, wide = place * room, high * image.shape[1] / image.shape[0]
            axes.imshow(image, extent=(left, left + wide, 1 - high, 1), aspect="auto", interpolation="antialiased")
        axes.set(xlim=(0, box.width / box.height), ylim=(0, 1))
        return bool(files)

    def _end(self, run: LoggedRun, name: str) -> float:
        """Last logged value of a run's metric, or its score from the table of runs; NaN if there is none."""
        group, _, rest = name.partition("/")
        if group != "eval":
            return next((step[name] for step in reversed(run.steps) if name in step), math.nan)
        benchmark, _, column = rest.rpartition("/")
        rows = self.scores[(self.scores["run"] == run.name) & (self.scores["benchmark"] == benchmark)]
        return next(iter(rows[column]), math.nan)


def _rows(section: Section) -> Iterator[list[Panel]]:
    """The panels of a section in rows of equal panel size; none for a collapsed section."""
    for per_row, group in groupby(section.panels, lambda panel: _PER_ROW.get(panel.kind, 4)):
        panels = [] if section.details else list(group)
        yield from (panels[start : start + per_row] for start in range(0, len(panels), per_row))


def _height(row: Sequence[Panel]) -> float:
    return _HEIGHTS.get(row[0].kind, _DEFAULT_HEIGHT)


def _bar(axes: Axes, section: Section) -> None:
    axes.set(facecolor=SHADE, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    text = f"▸  {section.title}   ({len(section.panels)} panels)" if section.details else f"▾  {section.title}"
    axes.text(0.004, 0.5, text, transform=axes.transAxes, va="center", fontsize=10)


def _line(axes: Axes, x: pd.Series | pd.Index, y: pd.Series, look: PlotStyle) -> None:
    """Draws the line of a loss, with a few markers."""
    axes.plot(x, y, **look.marker, linestyle=look.linestyle, markersize=3.5, markevery=max(1, len(y) // 6))


def _short(text: str) -> str:
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text if len(text) <= _MAX_CHARACTERS else f"{text[: _MAX_CHARACTERS - 1]}…"


def _note(axes: Axes, text: str) -> bool:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
