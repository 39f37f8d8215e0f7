"""Where the numbers come from, and what is not among them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from losslens.report.citation import works
from losslens.report.components import Cell, Column, Row, Section, Table
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.format import NOTHING, whole

# Shown in another way, or of no use to a reader elsewhere.
_NOT_SHOWN = ("adapters", "left_out", "measured_pairs", "code.dirty_diff", "machine.host", "origins", "command")
_PAIR = (Column("what", numeric=False), Column("value", numeric=False))


def left_out(analysis: AnalysisFolder) -> Section | None:
    """What was left out, and why; None where nothing was."""
    names = analysis.manifest.get("left_out") or {}
    if not names:
        return None
    rows = [Row([Cell(str(name)), Cell(str(why))]) for name, why in names.items()]
    columns = [Column("what", numeric=False), Column("why", numeric=False)]
    return Section("left-out", "Left out", tables=[Table("What was not compared, and why", columns, rows)])


def provenance(analysis: AnalysisFolder) -> Section:
    """Commands, configurations, versions and hashes, what makes the runs less than comparable, and how to cite."""
    manifest = analysis.manifest
    origins = manifest.get("origins") or {}
    rows = [Row([Cell(name), Cell(value)]) for name, value in _flat(manifest) if not name.startswith(_NOT_SHOWN)]
    rows += [
        Row([Cell(f"{kind}.{name}"), Cell(value)])
        for kind in ("rollouts", "base")
        for each in origins.get(kind) or []
        for name, value in _flat(each)
    ]
    common = [Row([Cell(name), Cell(value)]) for name, value in _flat(origins.get("configuration") or {})]
    commands = [*(origins.get("commands") or []), *([manifest["command"]] if manifest.get("command") else [])]
    version = str((manifest.get("versions") or {}).get("losslens") or "")
    cited = [Row([Cell(what), Cell(text, below=bibtex)]) for what, text, bibtex in works(version)]
    tables = [
        Table("Commands", [Column("", numeric=False)], [Row([Cell(command)]) for command in commands]),
        Table("Settings and versions", _PAIR, rows, closed=True),
        Table("Configuration that all runs share", _PAIR, common, closed=True),
        Table("Runs: where each comes from", _RUN_COLUMNS, _runs(manifest, origins), closed=True),
        Table("How to cite", [Column("what", numeric=False), Column("as", numeric=False)], cited, closed=True),
    ]
    return Section(
        "provenance", "Provenance", tables=[table for table in tables if table.rows], notes=_warnings(manifest)
    )


_RUN_COLUMNS = (
    Column("run", numeric=False), Column("what it alone has", numeric=False), Column("commit", numeric=False),
    Column("started", numeric=False), Column("seconds"), Column("SHA-256 of its adapter", numeric=False),
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
        changed = ", with changes" * bool(run.get("changed"))
        cells = [
            Cell(str(name)), Cell("", below=own), Cell(f"{commit}{changed}" or NOTHING),
            Cell(str(run.get("started") or NOTHING)), Cell(whole(float(run.get("seconds") or "nan"))),
            Cell(str(adapters.get(name, NOTHING))),
        ]  # fmt: skip
        rows.append(Row(cells))
    return rows


def _warnings(manifest: Mapping[str, Any]) -> list[str]:
    """What a reader would otherwise have to find in the tables."""
    runs = ((manifest.get("origins") or {}).get("runs") or {}).values()
    warnings = []
    left_out = manifest.get("left_out") or {}
    if left_out:
        warnings.append(f"{len(left_out)} thing{'s were' if len(left_out) > 1 else ' was'} left out: see above.")
    commits = {run["commit"] for run in runs if run.get("commit")}
    if len(commits) > 1:
        warnings.append(f"The runs come from {len(commits)} commits of the code.")
    changed = sum(bool(run.get("changed")) for run in runs)
    if changed:
        warnings.append(
            f"{changed} run{'s' * (changed > 1)} of {len(runs)} came from code with changes that are in no commit."
        )
    elsewhere = sum(bool(run.get("versions")) for run in runs)
    if elsewhere:
        warnings.append(
            f"{elsewhere} run{'s' * (elsewhere > 1)} of {len(runs)} came from other versions of the packages than the "
            "analysis."
        )
    precisions = {tuple(sorted((run.get("precision") or {}).items())) for run in runs}
    if len(precisions) > 1:
        warnings.append("The runs were trained in different precisions, or on different devices.")
    if (manifest.get("code") or {}).get("dirty_diff"):
        warnings.append("The analysis' code had changes that are in no commit; manifest.json has them.")
    return warnings


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, "none" if value is None else str(value)
