"""Untrusted regular expressions: compiled with bounded memory, to be matched with a timeout."""

from __future__ import annotations

import math
import re
from typing import Any

import regex

_MAX_LENGTH = 1000  # characters
_MAX_REPEATS = 10_000  # product of all counts in braces: how often nested repeats copy a subpattern when compiled


def compile_pattern(pattern: str) -> Any:
    """Compiles a pattern with the `regex` package, whose searches accept a `timeout`.

    Raises:
        ValueError: It is not a regular expression, or one that is too long or repeats too often.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"a regular expression must be a string, not {pattern!r:.40}")
    counts = [max(map(int, numbers)) for braces in re.findall(r"\{([^{}]*)\}", pattern)
              if (numbers := re.findall(r"\d{1,9}", braces))]  # fmt: skip
    if len(pattern) > _MAX_LENGTH or math.prod(max(count, 1) for count in counts) > _MAX_REPEATS:
        raise ValueError("the regular expression is too long or has too many repeats")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(str(error)) from error
