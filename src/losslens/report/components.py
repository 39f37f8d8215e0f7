"""The components of a page. Texts are plain; the template escapes them."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from losslens.tables.analysis_folder import AnalysisFolder

# Tables larger than this many bytes are gzipped; pandas and R read them directly.
_LARGE = 500_000


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: Its text.
        spread: Smaller text after it.
        below: Smaller text below it.
        bad: A warning below both, for example that a run diverged.
        colour: The colour of a mark before the text; empty for none.
    """

    text: str
    spread: str = ""
    below: str = ""
    bad: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        heading: Its heading.
        numeric: True if it holds numbers.
    """

    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        cells: Its cells.
        marked: True if it shows a failed run.
    """

    cells: Sequence[Cell]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """One table, scrolled inside its own box.

    Attributes:
        caption: Its caption.
        columns: Its columns; the first names the row.
        rows: Its rows.
        file: The name of the download; empty for none.
        content: The content of the download.
        closed: True if it is collapsed until opened.
        searched: True if a field above it shows only the rows that hold what is typed.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    file: str = ""
    content: bytes = b""
    closed: bool = False
    searched: bool = False

    @property
    def link(self) -> str:
        """The download as a data URL."""
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        title: Its title.
        caption: How to read it.
        plot: The plot.
        wide: True if it takes the whole width.
    """

    title: str
    caption: str
    plot: go.Figure
    wide: bool = False

    @property
    def json(self) -> Markup:
        """The plot as JSON for a `<script>`, with `<` escaped so that it cannot close the element."""
        return Markup(self.plot.to_json(validate=False).replace("<", "\\u003c"))


@dataclass(frozen=True)
class Square:
    """One cell of a matrix.

    Attributes:
        text: Its text.
        below: Smaller text below it.
        hover: Details shown on hover, line by line.
        ink: The colour of its end of the scale; empty for none.
        share: The share of that colour, from 0 to 1.
        strong: True if its text is white.
    """

    text: str
    below: str = ""
    hover: str = ""
    ink: str = ""
    share: float = 0.0
    strong: bool = False


@dataclass(frozen=True)
class Matrix:
    """A square matrix of coloured cells, rendered as a table whose row names stay visible when scrolled.

    Attributes:
        title: Its title.
        caption: How to read it.
        names: The names of the rows and columns.
        squares: The cells, row by row; the diagonal holds the repeats.
        low: The colour of −1.
        high: The colour of 1.
        wide: True if it takes the whole width.
    """

    title: str
    caption: str
    names: Sequence[str]
    squares: Sequence[Sequence[Square]]
    low: str
    high: str
    wide: bool = False


@dataclass(frozen=True)
class Keyed:
    """One loss of a legend.

    Attributes:
        loss: Its identifier in the traces of the plots.
        name: Its displayed name.
        about: A one-sentence description; may be empty.
        sample: Its mark, as an SVG.
    """

    loss: str
    name: str
    about: str
    sample: Markup


@dataclass(frozen=True)
class Key:
    """The legend of a section; each loss can be hidden in all plots."""

    losses: Sequence[Keyed]


@dataclass(frozen=True)
class Finding:
    """A finding in one sentence, and the id of the section with its numbers."""

    text: str
    section: str


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        text: Paragraphs before the figures.
        findings: The findings, shown after the text.
        key: The legend of its figures.
        figures: Its plots.
        tables: Its tables.
        notes: Notes needed to read the tables.
        explorer: The packed numbers of the explorer; empty in all other sections.
    """

    id: str
    title: str
    text: Sequence[str] = ()
    findings: Sequence[Finding] = ()
    key: Key | None = None
    figures: Sequence[Figure | Matrix] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    explorer: str = ""


def downloadable(
    analysis: AnalysisFolder, name: str, caption: str = "", columns: Sequence[Column] = (), rows: Sequence[Row] = ()
) -> Table:
    """Builds a table whose download is the whole table `name` of the analysis, whatever rows are shown."""
    content = analysis.csv(name)
    packed = len(content) > _LARGE
    # Without a timestamp, so that the same table gives the same page.
    content = gzip.compress(content, mtime=0) if packed else content
    return Table(caption, columns, rows, f"{name}.csv{'.gz' * packed}", content)
