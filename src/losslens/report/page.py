"""The page: its sections in their order, in one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from losslens.files import atomic_file
from losslens.report import (
    downloads,
    explore,
    glance,
    glossary,
    head,
    learning_rate,
    origin,
    runs,
    statistics,
    training,
    trajectories,
)
from losslens.report.folder import AnalysisFolder
from losslens.report.parts import Section
from losslens.report.words import about

_HERE = Path(__file__).parent
# One script: each file uses what stands in those before it.
_EXPLORER = (
    "packed", "texts", "measures", "choice", "numbers", "drawing", "weights", "functions", "link", "controls",
)  # fmt: skip
_SECTIONS: tuple[Callable[[AnalysisFolder], Section | None], ...] = (
    glance.section,
    explore.section,
    learning_rate.section,
    runs.section,
    statistics.section,
    trajectories.section,
    training.geometry,
    training.section,
    glossary.section,
    origin.left_out,
    origin.provenance,
)


def write_report(folder: Path) -> Path:
    """Writes `report.html` into the folder of an analysis, and returns its path.

    Raises:
        InputError: The analysis has no manifest, or a table is none.
    """
    analysis = AnalysisFolder(folder)
    sections = [section for make in _SECTIONS if (section := make(analysis))]
    sections += [section] if (section := downloads.section(analysis, sections)) else []
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["about"] = about
    names = ["vendor/plotly-cartesian.min.js", "page.js"]
    scripts = [_read(name) for name in names]
    if any(section.explorer for section in sections):
        scripts.append("".join(_read(f"explorer/{name}.js") for name in _EXPLORER))
    page = environment.get_template("page.html.jinja").render(
        title=head.title(analysis),
        facts=head.facts(analysis),
        sections=sections,
        style=Markup(_read("page.css") + _read("explore.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
    )
    report = folder / "report.html"
    with atomic_file(report) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return report


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What a content security policy knows a script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
