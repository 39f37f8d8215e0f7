"""Lines for the user that several jobs of one process would print alike."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1000)
def say_once(text: str) -> None:
    """Prints `text`, unless it is empty or this process printed it before."""
    if text:
        print(text, flush=True)
