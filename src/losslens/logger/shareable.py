"""What may leave this machine: texts without the path of the home folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def shareable(value: Any) -> Any:
    """The same with the home folder as `~` in every text of it, however deep."""
    if isinstance(value, str):
        for home in _homes():
            value = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", value)
        return value
    if isinstance(value, Mapping):
        return {name: shareable(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(entry) for entry in value]
    return value


def _homes() -> set[str]:
    """The paths of the home folder: none where nobody knows of one, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return set()
    return {str(home), str(home.resolve())} - {"/"}
