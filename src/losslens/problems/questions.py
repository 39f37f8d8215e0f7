"""Comparison of questions by their text, ignoring whitespace, case, Unicode form and template."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

# Ids that end in the question's hash (`question_hash`) identify it in any template.
_HASHED = re.compile(r"-[0-9a-f]{12}$")


def normalise(text: str) -> str:
    """Normalises Unicode form, case and whitespace."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


class SeenQuestions:
    """The questions of a set of prompts, for looking up others.

    Args:
        prompts: Texts of the prompts.
        templates: Templates, with `{question}`, that the prompts may have been created from.
        ids: Ids of the problems.
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
        """True if `prompt` contains one of these questions."""
        bare = self._bare_of(prompt, templates)
        # One of the two texts may contain further lines of instructions, but not both.
        return bool(
            bare & self._bare or bare & self._within or _lines_within(prompt) & self._bare or problem_id in self._ids
        )

    def _bare_of(self, prompt: str, templates: Iterable[str] = ()) -> set[str]:
        questions = {normalise(prompt)}
        for template in (*self._templates, *templates):
            before, _, after = template.partition("{question}")
            if (before or after) and prompt.startswith(before) and prompt.endswith(after):
                questions.add(normalise(prompt[len(before) : len(prompt) - len(after) or None]))
        return questions - {""}


def _lines_within(prompt: str) -> set[str]:
    """Returns the prompt without one or two first or last lines, which may be instructions."""
    lines = [line for line in prompt.split("\n") if line.strip()]
    parts = [lines[1:], lines[:-1], lines[1:-1], lines[2:], lines[:-2]] if len(lines) > 1 else []
    return {normalise("\n".join(part)) for part in parts} - {""}


def templates_of(identity: Any) -> tuple[str, ...]:
    """Returns the template of the prompts from the identity in a manifest of frozen rollouts; empty if unknown."""
    source = identity.get("source") if isinstance(identity, Mapping) else None
    template = source.get("template") if isinstance(source, Mapping) else None
    return (template,) if isinstance(template, str) and "{question}" in template else ()
