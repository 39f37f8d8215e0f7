"""Where the numbers come from, and what is not among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from losslens.report.folder import AnalysisFolder
from losslens.report.parts import Cell, Column, Row, Section, Table

# Shown in another way, or of no use to a reader elsewhere.
_NOT_SHOWN = ("adapters", "left_out", "measured_pairs", "code.dirty_diff", "machine.host")


def left_out(analysis: AnalysisFolder) -> Section | None:
    """What was left out, and why; None where nothing was."""
    names = analysis.manifest.get("left_out") or {}
    if not names:
        return None
    rows = [Row([Cell(str(name)), Cell(str(why))]) for name, why in names.items()]
    columns = [Column("what", numeric=False), Column("why", numeric=False)]
    return Section("left-out", "Left out", tables=[Table("What was not compared, and why", columns, rows)])


def provenance(analysis: AnalysisFolder) -> Section:
    """The settings, versions and hashes."""
    manifest = analysis.manifest
    rows = [Row([Cell(name), Cell(value)]) for name, value in _flat(manifest) if not name.startswith(_NOT_SHOWN)]
    adapters = [Row([Cell(str(name)), Cell(str(sha))]) for name, sha in (manifest.get("adapters") or {}).items()]
    pair = [Column("what", numeric=False), Column("value", numeric=False)]
    tables = [Table("Settings and versions", pair, rows, closed=True)]
    if adapters:
        columns = [Column("run", numeric=False), Column("SHA-256 of its adapter", numeric=False)]
        tables.append(Table("Adapters", columns, adapters, closed=True))
    changed = (manifest.get("code") or {}).get("dirty_diff")
    text = ["The code had changes that are in no commit; manifest.json has them."] if changed else []
    return Section("provenance", "Provenance", text=text, tables=tables)


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, "none" if value is None else str(value)
