"""The training curves: what each run logged while it was trained."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from losslens.losses.presentation import diagnostic_titles
from losslens.report import step_curves
from losslens.report.components import Figure, Section, downloadable
from losslens.report.legends import legend_of
from losslens.report.loss_comparison import Comparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.descriptions import COURSE, TO_REFERENCE, TRAINING, WITH_REFERENCE
from losslens.tables.format import number, rate
from losslens.tables.style import loss_title

# What says something even where it never changes.
_TELLING = ("weight_", "clip_")
# What analysis/training_table.py puts before the numbers of the growing adapter.
_GEOMETRY = "geometry_"


def section(analysis: AnalysisFolder) -> Section | None:
    """What the losses logged; None where nothing was."""
    names = [name for name in _logged(analysis) if not name.startswith(_GEOMETRY)]
    # As analysis/training_table.py calls the columns.
    known = TRAINING | WITH_REFERENCE | diagnostic_titles()
    titles = {name.replace("/", "_"): title for name, title in known.items()}
    return _section(
        analysis,
        "training",
        "Training",
        "As it was logged. The losses of two methods are two quantities: compare their course.",
        {name: titles.get(name, name) for name in names},
    )


def geometry(analysis: AnalysisFolder) -> Section | None:
    """The geometry of the updates as they grew; None where it was not logged."""
    logged = [name.removeprefix(_GEOMETRY) for name in _logged(analysis) if name.startswith(_GEOMETRY)]
    titles = {name: title for name, title in COURSE.items() if name in logged}
    for begin, title in TO_REFERENCE.items():
        known = (name for name in logged if name.startswith(begin) and name not in COURSE)
        titles |= {name: title.format(loss_title(name.removeprefix(begin))) for name in known}
    return _section(
        analysis,
        "geometry",
        "Geometry over the steps",
        "Where the weights went while each run trained: its update ΔW at every logged step. SFT, or another reference, "
        "is a finished run.",
        {f"{_GEOMETRY}{name}": title for name, title in titles.items()},
    )


def _logged(analysis: AnalysisFolder) -> list[str]:
    return [name for name in analysis.columns("training") if name not in ("run", "step")]


def _section(analysis: AnalysisFolder, id: str, title: str, text: str, titles: dict[str, str]) -> Section | None:
    table = analysis.table("training", ("run",), ("step", *titles))
    shown = {name: of for name, of in titles.items() if table[name].nunique() > (0 if name.startswith(_TELLING) else 1)}
    if not shown:
        return None
    comparison = Comparison(analysis)
    table = step_curves.by_loss(table, comparison)
    return Section(
        id,
        title,
        text=[f"{text}{step_curves.spread(table)}"],
        key=legend_of(comparison, table["loss_of"], lines=True),
        figures=[Figure(of, "", _plot(table, comparison, name, of)) for name, of in shown.items()],
        tables=[downloadable(analysis, "training")] if id == "training" else [],
    )


def _plot(table: pd.DataFrame, comparison: Comparison, name: str, title: str) -> go.Figure:
    axis = title[0].lower() + title[1:]
    return step_curves.plot(table, comparison, name, axis, rate if name == "lr" else number)
