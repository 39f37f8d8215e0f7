"""The glossary: each loss and each measure of the page in a sentence."""

from __future__ import annotations

from losslens.losses.presentation import get_presentation
from losslens.report.components import Cell, Column, Row, Section, Table
from losslens.report.loss_comparison import Comparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.descriptions import glossary
from losslens.tables.style import colour, in_plot_order, loss_title


def section(analysis: AnalysisFolder) -> Section | None:
    """The section; None where nothing was trained and so nothing measured."""
    methods = in_plot_order(loss.method for loss in Comparison(analysis).losses)
    if not methods:
        return None
    losses = [(loss_title(m), get_presentation(m).summary, colour(m)) for m in methods if get_presentation(m).summary]
    measures = [(name, text, "") for name, text in glossary().items()]
    return Section(
        "words",
        "In plain words",
        tables=[
            Table(
                caption,
                [Column(of, numeric=False), Column("in a sentence", numeric=False)],
                [Row([Cell(name, colour=ink), Cell(text)]) for name, text, ink in rows],
            )
            for caption, of, rows in (("The losses", "loss", losses), ("The measures", "measure", measures))
            if rows
        ],
        notes=["Equations and definitions: docs/reference/losses and docs/reference/measures.md of LossLens."],
    )
