"""What a page is put together from. Texts are plain; the template escapes them."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from losslens.tables.analysis_folder import AnalysisFolder

# Larger tables are packed: pandas and R read them as they are.
_LARGE = 500_000


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What stands in it.
        spread: Beside the text, smaller.
        below: Under the text, smaller.
        bad: Under both: what went wrong.
        colour: Of the mark before the text, if any.
    """

    text: str
    spread: str = ""
    below: str = ""
    bad: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Column:
    """One column: its heading, and whether it holds numbers."""

    heading: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """One row; `marked` where something went wrong with what it shows."""

    cells: Sequence[Cell]
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """One table, scrolled inside its own box.

    Attributes:
        caption: What it shows.
        columns: Its columns; the first names the row.
        rows: Its rows.
        file: Name of the download, if any.
        content: What is downloaded.
        closed: Whether it opens on demand only.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    file: str = ""
    content: bytes = b""
    closed: bool = False

    @property
    def link(self) -> str:
        """The download, inside the page."""
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Figure:
    """One plot.

    Attributes:
        title: What it shows.
        caption: How to read it.
        plot: The plot.
        wide: Whether it takes the whole width.
    """

    title: str
    caption: str
    plot: go.Figure
    wide: bool = False

    @property
    def json(self) -> Markup:
        """The plot for a `<script>`, which only `<` could end."""
        return Markup(self.plot.to_json(validate=False).replace("<", "\\u003c"))


@dataclass(frozen=True)
class Square:
    """One cell of a matrix.

    Attributes:
        text: What stands in it.
        below: Under the text, smaller.
        hover: All that is known of it, line by line.
        ink: The colour of its end of the scale, if any.
        share: How much of that colour it has, from 0 to 1.
        strong: Whether white is read better on it than ink.
    """

    text: str
    below: str = ""
    hover: str = ""
    ink: str = ""
    share: float = 0.0
    strong: bool = False


@dataclass(frozen=True)
class Matrix:
    """A square of coloured cells, as a table: on a narrow screen it is scrolled beside its names.

    Attributes:
        title: What it shows.
        caption: How to read it.
        names: Of the rows, and of the columns.
        squares: The cells, row by row; the diagonal is of another kind.
        low: The colour of −1.
        high: The colour of 1.
        wide: Whether it takes the whole width.
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
    """One loss of a key.

    Attributes:
        loss: As the traces of its plots have it.
        name: What a reader calls it.
        about: What it is, in a sentence; may be empty.
        sample: Its mark, as an SVG.
    """

    loss: str
    name: str
    about: str
    sample: Markup


@dataclass(frozen=True)
class Key:
    """What colours, marks and dashes mean: each loss, which can be hidden in all plots."""

    losses: Sequence[Keyed]


@dataclass(frozen=True)
class Finding:
    """One sentence that the numbers carry, and the id of the section that has them all."""

    text: str
    section: str


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        text: Paragraphs before the figures.
        findings: What the numbers say, after the text.
        key: What colours and marks mean in its figures.
        figures: Its plots.
        tables: Its tables.
        notes: What must be known to read the tables.
        explorer: The packed numbers of the explorer, in the section that is one.
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
    """The analysis' table `name`, which a reader can have whole, and what is shown of it."""
    content = analysis.csv(name)
    packed = len(content) > _LARGE
    # Without a time in it, the same table gives the same page.
    content = gzip.compress(content, mtime=0) if packed else content
    return Table(caption, columns, rows, f"{name}.csv{'.gz' * packed}", content)
