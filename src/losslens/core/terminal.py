"""Terminal tables for untrusted text: no markup, no control characters."""

from __future__ import annotations

from typing import Any

import rich.table
from rich.text import Text

from losslens.core.redaction import escape_control


class Table(rich.table.Table):
    """A Rich table whose cells are literal text."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Adds a row; strings are shown literally, with control characters escaped."""
        super().add_row(*(Text(escape_control(cell)) if isinstance(cell, str) else cell for cell in cells), **options)
