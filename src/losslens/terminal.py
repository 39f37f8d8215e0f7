"""What is printed reaches any terminal."""

from __future__ import annotations

import sys
from contextlib import suppress


def forgive_its_encoding() -> None:
    """Prints ? for what a terminal cannot show (latin-1, ASCII), where Python would stop with an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by a test, or closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
