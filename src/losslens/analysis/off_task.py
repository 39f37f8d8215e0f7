"""The off-task text: plain English that comes with LossLens and has nothing to do with any task."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from losslens.core.hashing import hash_text
from losslens.measures.forward import Sequences

_FILE = Path(__file__).with_name("off_task.txt")
# Longest window in tokens.
_WINDOW = 256


class OffTaskText:
    """The text in windows: each paragraph by itself, longer ones cut. It was written for LossLens.

    Args:
        positions: Maximum sequence length of the model in tokens; None if unlimited or unknown.
    """

    def __init__(self, positions: int | None) -> None:
        self._window = min(_WINDOW, positions or _WINDOW)

    @cached_property
    def text(self) -> str:
        """The text, its paragraphs separated by empty lines."""
        return _FILE.read_text(encoding="utf-8")

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hash_text(self.text)

    @property
    def key(self) -> list[Any]:
        """The identity of these sequences, for cache keys."""
        return [self.sha256, self._window]

    def tokens(self, tokenizer: Any) -> Sequences:
        """Returns the windows; the first token of each is its prompt, since not every model has one to begin with."""
        windows = []
        for paragraph in self.text.strip().split("\n\n"):
            ids = tokenizer(paragraph, add_special_tokens=False)["input_ids"]
            windows += [ids[start : start + self._window] for start in range(0, len(ids), self._window)]
        windows = [window for window in windows if len(window) > 1]
        return Sequences([window[:1] for window in windows], [window[1:] for window in windows])
