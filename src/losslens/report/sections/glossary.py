"""The glossary: each term, loss and measure of the page in one sentence."""

from __future__ import annotations

from losslens.losses.presentation import get_presentation
from losslens.report.components import Cell, Column, Row, Section, Table
from losslens.report.loss_comparison import LossComparison
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.descriptions import EXPERIMENT, JUDGEMENT, measure_terms
from losslens.tables.style import colour, in_plot_order, loss_title


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None without a trained run."""
    methods = in_plot_order(loss.method for loss in LossComparison(analysis).losses)
    if not methods:
        return None
    losses = [(loss_title(m), get_presentation(m).summary, colour(m)) for m in methods if get_presentation(m).summary]
    terms = [(name, text, "") for name, text in (EXPERIMENT | JUDGEMENT).items()]
    measures = [(name, text, "") for name, text in measure_terms().items()]
    return Section(
        "words",
        "Glossary",
        tables=[
            Table(
                caption,
                [Column(heading, numeric=False), Column("meaning", numeric=False)],
                [Row([Cell(name, colour=ink), Cell(text)]) for name, text, ink in rows],
            )
            for caption, heading, rows in (
                ("Terms", "term", terms),
                ("Losses", "loss", losses),
                ("Measures", "measure", measures),
            )
            if rows
        ],
        notes=["Equations and full definitions: docs/reference/losses and docs/reference/measures.md of LossLens."],
    )
