"""Every table that no section has brought along, to be had from the page."""

from __future__ import annotations

import gzip
from collections.abc import Sequence

from losslens.report.folder import AnalysisFolder
from losslens.report.parts import Section, Table

# Larger ones are packed: pandas and R read them as they are.
_LARGE = 500_000


def section(analysis: AnalysisFolder, sections: Sequence[Section]) -> Section | None:
    """The section; None where every table is linked in `sections` already."""
    there = {table.file for each in sections for table in each.tables}
    tables = []
    for file in sorted(analysis.path.glob("*.csv")):
        content = file.read_bytes()
        if file.name in there or content.count(b"\n") < 2:  # without a row
            continue
        packed = len(content) > _LARGE
        name = f"{file.name}.gz" if packed else file.name
        # Without a time in it, the same table gives the same page.
        tables.append(Table("", [], [], name, gzip.compress(content, mtime=0) if packed else content))
    if not tables:
        return None
    text = ["The tables that are not linked above. What stands in each column: docs/measures.md."]
    if list(analysis.path.glob("*.parquet")):
        text.append("modules.parquet and run_modules.parquet, too large for a page, lie in its folder.")
    return Section("tables", "Tables", text=text, tables=tables)
