"""Builds the report page from its sections, as one self-contained file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from losslens.core.files import atomic_file
from losslens.report.components import Section, downloadable
from losslens.report.sections import (
    activation_shifts,
    adapter_map,
    explorer,
    glance,
    glossary,
    gradients,
    header,
    interventions,
    learning_rate,
    lineage,
    loss_family,
    published,
    runs,
    statistics,
    training,
    trajectories,
    tuning,
    weight_profile,
)
from losslens.tables.analysis_folder import AnalysisFolder
from losslens.tables.descriptions import describe

_HERE = Path(__file__).parent
# Joined into one script: each file uses definitions of those before it.
_EXPLORER = (
    "packed", "texts", "measures", "choice", "numbers", "drawing", "weights", "functions", "link", "controls",
)  # fmt: skip
_SECTIONS: tuple[Callable[[AnalysisFolder], Section | None], ...] = (
    glance.section,
    published.section,
    explorer.section,
    learning_rate.section,
    loss_family.section,
    gradients.section,
    tuning.section,
    interventions.section,
    runs.section,
    statistics.section,
    weight_profile.section,
    activation_shifts.section,
    trajectories.section,
    training.geometry,
    training.section,
    glossary.section,
    lineage.left_out,
    lineage.provenance,
)
# Of an analysis of norms and cosines alone.
_MAP_SECTIONS = (published.section, adapter_map.section, lineage.left_out, lineage.provenance)


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of an analysis and returns its path.

    Raises:
        InputError: The analysis has no manifest, or a table cannot be read.
    """
    analysis = AnalysisFolder(folder)
    of_many = analysis.manifest.get("measures") == "cosines"
    sections = [section for make in (_MAP_SECTIONS if of_many else _SECTIONS) if (section := make(analysis))]
    if not of_many and (section := _other_tables(analysis, sections)):
        sections.append(section)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["about"] = describe
    names = ["vendor/plotly-cartesian.min.js", "page.js"]
    scripts = [_read(name) for name in names]
    if any(section.explorer for section in sections):
        scripts.append("".join(_read(f"explorer/{name}.js") for name in _EXPLORER))
    page = environment.get_template("page.html.jinja").render(
        title=header.title(analysis),
        facts=header.header_facts(analysis),
        sections=sections,
        style=Markup(_read("page.css") + _read("explore.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )
    report = folder / "report.html"
    with atomic_file(report) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return report


def _other_tables(analysis: AnalysisFolder, sections: Sequence[Section]) -> Section | None:
    """Builds a section with the downloads that no other section links; None if there are none."""
    linked = {table.file.partition(".")[0] for section in sections for table in section.tables}
    names = [file.stem for file in sorted(analysis.path.glob("*.csv")) if file.stem not in linked]
    # Tables without rows are left out.
    tables = [downloadable(analysis, name) for name in names if analysis.csv(name).count(b"\n") > 1]
    if not tables:
        return None
    text = ["All tables that are not linked above. docs/reference/measures.md defines their columns."]
    if list(analysis.path.glob("*.parquet")):
        text.append("modules.parquet and run_modules.parquet are too large for this page; they are in its folder.")
    return Section("tables", "Tables", text=text, tables=tables)


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """Returns the hash of a script for the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
