"""Regular expressions that a stranger may have written: compiled in bounded space, to be matched with a timeout."""

from __future__ import annotations

import math
import re
from typing import Any

import regex

_LONGEST = 1000  # characters
_REPEATS = 10_000  # all counts in braces multiplied: as often a pattern that nests them is copied when it is compiled


def compile_pattern(pattern: str) -> Any:
    """The pattern, of the `regex` package, whose searches take a `timeout`.

    Raises:
        ValueError: It is no regular expression, or one that would take more space than any sensible one.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"a regular expression is text, not {pattern!r:.40}")
    counts = [max(map(int, found)) for braces in re.findall(r"\{([^{}]*)\}", pattern)
              if (found := re.findall(r"\d{1,9}", braces))]  # fmt: skip
    if len(pattern) > _LONGEST or math.prod(max(count, 1) for count in counts) > _REPEATS:
        raise ValueError("too long, or repeated too often")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error
