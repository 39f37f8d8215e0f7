"""Provenance of the numbers, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from losslens.core.mappings import flatten
from losslens.report.citation import works
from losslens.report.components import Cell, Column, Row, Section, Table
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, whole

# Shown elsewhere on the page, or of no use to readers.
_NOT_SHOWN = ("adapters", "left_out", "measured_pairs", "code.dirty_diff", "machine.host", "origins", "command")
_PAIR = (Column("what", numeric=False), Column("value", numeric=False))


def left_out(analysis: AnalysisFolder) -> Section | None:
    """Builds the section of what was left out and why; None if nothing was."""
    names = analysis.manifest.get("left_out") or {}
    if not names:
        return None
    rows = [Row([Cell(str(name)), Cell(str(why))]) for name, why in names.items()]
    columns = [Column("what", numeric=False), Column("why", numeric=False)]
    return Section("left-out", "Left out", tables=[Table("What was not compared, and why", columns, rows)])


def provenance(analysis: AnalysisFolder) -> Section:
    """Builds the section of commands, configurations, versions, hashes, warnings and citations."""
    manifest = analysis.manifest
    origins = manifest.get("origins") or {}
    rows = [row for row in _rows(manifest) if not row.cells[0].text.startswith(_NOT_SHOWN)]
    rows += [
        row for kind in ("rollouts", "base") for origin in origins.get(kind) or [] for row in _rows(origin, f"{kind}.")
    ]
    common = _rows(origins.get("configuration") or {})
    commands = [*(origins.get("commands") or []), *([manifest["command"]] if manifest.get("command") else [])]
    version = str((manifest.get("versions") or {}).get("losslens") or "")
    cited = [Row([Cell(what), Cell(text, below=bibtex)]) for what, text, bibtex in works(version)]
    tables = [
        Table("Commands", [Column("", numeric=False)], [Row([Cell(command)]) for command in commands]),
        Table("Settings and versions", _PAIR, rows, closed=True),
        Table("Configuration shared by all runs", _PAIR, common, closed=True),
        Table("Provenance of each run", _RUN_COLUMNS, _runs(manifest, origins), closed=True),
        Table("How to cite", [Column("what", numeric=False), Column("as", numeric=False)], cited, closed=True),
    ]
    return Section(
        "provenance", "Provenance", tables=[table for table in tables if table.rows], notes=_warnings(manifest)
    )


_RUN_COLUMNS = (
    Column("run", numeric=False), Column("own settings", numeric=False), Column("commit", numeric=False),
    Column("started", numeric=False), Column("seconds"), Column("SHA-256 of the adapter", numeric=False),
)  # fmt: skip


def _runs(manifest: Mapping[str, Any], origins: Mapping[str, Any]) -> list[Row]:
    adapters, runs = manifest.get("adapters") or {}, origins.get("runs") or {}
    rows = []
    for name in dict.fromkeys([*adapters, *runs]):
        run = runs.get(name) or {}
        own = "\n".join(
            f"{key}={value}" for key, value in {**(run.get("own") or {}), **(run.get("versions") or {})}.items()
        )
        commit = str(run.get("commit") or "")[:12]
        changed = ", with uncommitted changes" * bool(run.get("changed"))
        cells = [
            Cell(str(name)), Cell("", below=own), Cell(f"{commit}{changed}" or NOTHING),
            Cell(str(run.get("started") or NOTHING)), Cell(whole(float(run.get("seconds") or "nan"))),
            Cell(str(adapters.get(name, NOTHING))),
        ]  # fmt: skip
        rows.append(Row(cells))
    return rows


def _warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Returns what makes the runs less comparable, such as several commits or precisions."""
    runs = ((manifest.get("origins") or {}).get("runs") or {}).values()
    warnings = []
    left_out = manifest.get("left_out") or {}
    if left_out:
        warnings.append(f"{len(left_out)} item{'s were' if len(left_out) > 1 else ' was'} left out: see above.")
    commits = {run["commit"] for run in runs if run.get("commit")}
    if len(commits) > 1:
        warnings.append(f"The runs were trained with {len(commits)} different commits of the code.")
    changed = sum(bool(run.get("changed")) for run in runs)
    if changed:
        warnings.append(
            f"{changed} of {len(runs)} run{'s' * (len(runs) > 1)} {'were' if changed > 1 else 'was'} trained with "
            "uncommitted changes of the code."
        )
    elsewhere = sum(bool(run.get("versions")) for run in runs)
    if elsewhere:
        warnings.append(
            f"{elsewhere} of {len(runs)} run{'s' * (len(runs) > 1)} {'were' if elsewhere > 1 else 'was'} trained with "
            "other package versions than the analysis used."
        )
    precisions = {tuple(sorted((run.get("precision") or {}).items())) for run in runs}
    if len(precisions) > 1:
        warnings.append("The runs were trained in different precisions or on different devices.")
    if (manifest.get("code") or {}).get("dirty_diff"):
        warnings.append("The code of the analysis had uncommitted changes; they are in manifest.json.")
    return warnings


def _rows(content: Any, prefix: str = "") -> list[Row]:
    return [Row([Cell(f"{prefix}{name}"), Cell(_text(value))]) for name, value in flatten(content).items()]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None or value == {} else str(value)
