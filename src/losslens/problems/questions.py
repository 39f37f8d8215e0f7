"""Whether two prompts ask the same: by their text, whatever its spacing, case and Unicode form, and its template."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Ids that are made of the question's hash (`question_hash`) name it whatever stands around it.
_HASHED = re.compile(r"-[0-9a-f]{12}$")


def normalise(text: str) -> str:
    """A text in one Unicode form, without case, its white space single."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


class SeenQuestions:
    """The questions of a set of prompts, to look others up in.

    Args:
        prompts: Their texts.
        templates: What the question may have been put into, `{question}` standing for it.
        ids: Their ids.
    """

    def __init__(self, prompts: Iterable[str], templates: Iterable[str] = (), ids: Iterable[str] = ()) -> None:
        self._templates = tuple(templates)
        self._bare: set[str] = set()
        self._within: set[str] = set()
        self._ids = {name for name in ids if _HASHED.search(name)}
        for prompt in dict.fromkeys(prompts):
            bare = self._bare_of(prompt)
            self._bare |= bare
            self._within |= _lines_within(prompt) - bare

    def has(self, prompt: str, templates: Iterable[str] = (), problem_id: str = "") -> bool:
        """Whether `prompt` asks what one of these does."""
        bare = self._bare_of(prompt, templates)
        # One of the two texts may have instructions around it, in lines of their own; not both.
        return bool(
            bare & self._bare or bare & self._within or _lines_within(prompt) & self._bare or problem_id in self._ids
        )

    def _bare_of(self, prompt: str, templates: Iterable[str] = ()) -> set[str]:
        found = {normalise(prompt)}
        for template in (*self._templates, *templates):
            before, _, after = template.partition("{question}")
            if (before or after) and prompt.startswith(before) and prompt.endswith(after):
                found.add(normalise(prompt[len(before) : len(prompt) - len(after) or None]))
        return found - {""}


def _lines_within(prompt: str) -> set[str]:
    """What is left of a prompt without its first lines or its last: there stand instructions."""
    lines = [line for line in prompt.split("\n") if line.strip()]
    parts = [lines[1:], lines[:-1], lines[1:-1], lines[2:], lines[:-2]] if len(lines) > 1 else []
    return {normalise("\n".join(part)) for part in parts} - {""}


def templates_of(identity: Any) -> tuple[str, ...]:
    """The template that the manifest of frozen rollouts says its prompts were put into."""
    source = identity.get("source") if isinstance(identity, Mapping) else None
    template = source.get("template") if isinstance(source, Mapping) else None
    return (template,) if isinstance(template, str) and "{question}" in template else ()
