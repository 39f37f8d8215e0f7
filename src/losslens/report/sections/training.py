"""The training curves: the metrics that each run logged during training."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.losses.presentation import diagnostic_titles
from losslens.report import step_curves
from losslens.report.components import Figure, Section, downloadable
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.descriptions import COURSE, TO_REFERENCE, TRAINING, WITH_REFERENCE
from losslens.tables.format import number, rate
from losslens.tables.style import loss_title

# Prefixes of metrics that are informative even if constant.
_SHOWN_IF_CONSTANT = ("weight_", "clip_")
# Prefix that analysis/training_table.py gives to the measures of the growing update.
_GEOMETRY = "geometry_"


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section of logged metrics; None if there are none."""
    names = [name for name in _logged(analysis) if not name.startswith(_GEOMETRY)]
    # The column names of analysis/training_table.py.
    known = TRAINING | WITH_REFERENCE | diagnostic_titles()
    titles = {name.replace("/", "_"): title for name, title in known.items()}
    return _section(
        analysis,
        "training",
        "Training",
        "Metrics as logged. The losses of two methods are different quantities: compare the shapes of their curves, "
        "not their values.",
        {name: titles.get(name, name) for name in names},
    )


def geometry(analysis: AnalysisFolder) -> Section | None:
    """Builds the section on the geometry of the growing updates; None if it was not logged."""
    logged = [name.removeprefix(_GEOMETRY) for name in _logged(analysis) if name.startswith(_GEOMETRY)]
    titles = {name: title for name, title in COURSE.items() if name in logged}
    for begin, title in TO_REFERENCE.items():
        known = (name for name in logged if name.startswith(begin) and name not in COURSE)
        titles |= {name: title.format(loss_title(name.removeprefix(begin))) for name in known}
    return _section(
        analysis,
        "geometry",
        "Geometry over the steps",
        "The update ΔW of each run at every logged step of training. SFT, or another reference, is a finished run.",
        {f"{_GEOMETRY}{name}": title for name, title in titles.items()},
    )


def _logged(analysis: AnalysisFolder) -> list[str]:
    return [name for name in analysis.columns("training") if name not in ("run", "step")]


def _section(analysis: AnalysisFolder, id: str, title: str, text: str, titles: dict[str, str]) -> Section | None:
    table = analysis.table("training", ("run",), ("step", *titles))
    least = {name: 1 if name.startswith(_SHOWN_IF_CONSTANT) else 2 for name in titles}
    shown = {name: heading for name, heading in titles.items() if table[name].nunique() >= least[name]}
    if not shown:
        return None
    comparison = LossComparison(analysis)
    table = step_curves.by_loss(table, comparison)
    return Section(
        id,
        title,
        text=[f"{text}{step_curves.spread(table)}"],
        key=legend_of(comparison, table["loss_of"], lines=True),
        figures=[Figure(heading, "", _plot(table, comparison, name, heading)) for name, heading in shown.items()],
        tables=[downloadable(analysis, "training")] if id == "training" else [],
    )


def _plot(table: pd.DataFrame, comparison: LossComparison, name: str, title: str) -> go.Figure:
    axis = title[0].lower() + title[1:]
    return step_curves.plot(table, comparison, name, axis, rate if name == "lr" else number)
