"""Nested mappings as flat ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Returns the leaves of nested mappings by their dotted names; an empty mapping is a leaf."""
    if not isinstance(value, Mapping) or not value:
        return {name: value} if name else {}
    return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{name}.{key}" if name else key).items()}
