"""Updates the tables of measures in docs/, between their markers: `make docs`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from losslens.core.files import atomic_file
from losslens.measures import Measure, PairMeasure, function_measures, run_measures, weight_measures
from losslens.tables.descriptions import glossary

_BLOCK = re.compile(r"(<!-- measures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def blocks() -> dict[str, str]:
    """Returns the tables of the reference as Markdown, by the names of their markers."""
    live: list[tuple[str, Measure]] = [(m.name, m) for m in run_measures() if not m.needs_base]
    live += [(f"{m.name}_to_<label>", m) for m in weight_measures("main")]
    return {
        "words": _table(("", ""), glossary().items()),
        "runs": _table(
            ("column", "definition", "null", "source"),
            ((*_definition(m), _null_column(m), m.source) for m in run_measures()),
        ),
        "weights": _pairs(weight_measures()),
        "functions": _pairs(function_measures()),
        "live": _table(("name", "definition", "unit"), ((f"`{name}`", m.definition, m.unit) for name, m in live)),
    }


def written(text: str) -> str:
    """Returns the text of a page with its tables updated.

    Raises:
        KeyError: A marker names an unknown table.
    """
    return _BLOCK.sub(lambda match: match[1] + blocks()[match[2]] + match[3], text)


def _pairs(measures: Iterable[PairMeasure]) -> str:
    header = ("column", "definition", "of identical updates", "null", "beside it", "source")
    rows = ((*_definition(m), f"{m.identical:g}", _null_column(m), f"`_{m.level}`", m.source) for m in measures)
    return _table(header, rows)


def _definition(measure: Measure) -> tuple[str, str]:
    unit = f" ({measure.unit})" * (measure.unit == "nats per token")
    return f"`{measure.name}`", f"{measure.definition}{unit}"


def _null_column(measure: Measure) -> str:
    return f"`{measure.name}_null`" if measure.has_null else ""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        text = written(page.read_text(encoding="utf-8"))
        with atomic_file(page) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="\n")
