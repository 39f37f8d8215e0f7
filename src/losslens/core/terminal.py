"""Tables on the screen whose cells are text, names and errors of others too: no markup, nothing that steers."""

from __future__ import annotations

from typing import Any

import rich.table
from rich.text import Text

from losslens.core.redaction import escape_control


class Table(rich.table.Table):
    """Rich's, which takes what stands in a cell as it stands there."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Adds a row; a text among `cells` is shown as it is, but for control characters."""
        super().add_row(*(Text(escape_control(cell)) if isinstance(cell, str) else cell for cell in cells), **options)
