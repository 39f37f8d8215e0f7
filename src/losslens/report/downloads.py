"""Every table that no section has brought along, to be had from the page."""

from __future__ import annotations

from collections.abc import Sequence

from losslens.report.folder import AnalysisFolder
from losslens.report.parts import Section, downloadable


def section(analysis: AnalysisFolder, sections: Sequence[Section]) -> Section | None:
    """The section; None where every table is linked in `sections` already."""
    there = {table.file.partition(".")[0] for each in sections for table in each.tables}
    names = [file.stem for file in sorted(analysis.path.glob("*.csv")) if file.stem not in there]
    # Without a row there is nothing to have.
    tables = [downloadable(analysis, name) for name in names if analysis.csv(name).count(b"\n") > 1]
    if not tables:
        return None
    text = ["The tables that are not linked above. What stands in each column: docs/measures.md."]
    if list(analysis.path.glob("*.parquet")):
        text.append("modules.parquet and run_modules.parquet, too large for a page, lie in its folder.")
    return Section("tables", "Tables", text=text, tables=tables)
