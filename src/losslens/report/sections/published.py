"""The study's own adapters beside the figures of its paper."""

from __future__ import annotations

import math

from losslens.losses.presentation import builtin_presentations
from losslens.measures import get_measure
from losslens.report.citation import ARXIV
from losslens.report.components import Cell, Column, Row, Section, downloadable
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING
from losslens.tables.style import loss_title


def section(analysis: AnalysisFolder) -> Section | None:
    """Builds the section; None for an analysis of other adapters."""
    table = analysis.table(
        "published", ("measure", "first", "second", "adapters"), ("paper_low", "paper_high", "here", "difference")
    )
    if table.empty:
        return None
    rows = []
    for _, row in table.iterrows():
        measure = get_measure(row["measure"])
        low, high = measure.show(row["paper_low"]), measure.show(row["paper_high"])
        found = not math.isnan(row["here"])
        cells = [
            Cell(measure.label), Cell(" and ".join(_title(row[side]) for side in ("first", "second") if row[side])),
            Cell(low if low == high else f"{low}–{high}"),
            Cell(measure.show(row["here"]), below="" if found else row["adapters"]),
            Cell(measure.show(row["difference"]) if found else NOTHING),
        ]  # fmt: skip
        rows.append(Row(cells))
    columns = [
        Column("measure", numeric=False), Column("of", numeric=False), Column("paper"), Column("here"),
        Column("difference"),
    ]  # fmt: skip
    known = int(table["here"].notna().sum())
    return Section(
        "published",
        "Beside the paper",
        text=[
            f"The figures of arXiv {ARXIV} beside the same measures of these adapters (seed 42, at the conventional "
            f"rates): {known} of {len(table)} were found."
        ],
        tables=[downloadable(analysis, "published", "Figures of the paper, and of these adapters", columns, rows)],
        notes=["Where the paper gives a range, the difference is that to its nearer end, 0 inside it."],
    )


def _title(loss: str) -> str:
    return loss_title(loss) if loss in builtin_presentations() else loss.upper()
