"""Messages for the user that are printed once, however many jobs of a process emit them."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=1000)
def print_once(text: str) -> None:
    """Prints `text`, unless it is empty or this process has printed it before."""
    if text:
        print(text, flush=True)
