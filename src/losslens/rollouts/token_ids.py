"""Token ids of frozen rollouts: those that were sampled, or those of the text if a tokenizer has no use for them.

For rollouts that exist only as text, as in a user's file, this module handles end tokens, special tokens and templates,
and summarises what was done in one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from losslens.core.notices import print_once
from losslens.models.tokens import (
    chat_turns,
    decode,
    encode_prompt,
    encode_rendered,
    is_templated,
    render_prompt,
    tokenizer_fingerprint,
    with_end,
)

if TYPE_CHECKING:
    import pandas as pd

_FOREIGN_END = re.compile(r"(</s>|<\|[^\s<>|]{1,40}\|>|<(?:eos|end_of_turn)>)\s*$")  # end tokens of other models


def read_rollouts(
    table: pd.DataFrame, tokenizer: Any, manifest: Mapping[str, Any] | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns the token ids of each rollout's prompt and completion; prints once what differs from how it was sampled.

    Args:
        table: Frozen rollouts; `prompt_text`, `prompt_ids` and `completion_ids` may be missing or null.
        tokenizer: Tokenizer of the base.
        manifest: Manifest of the rollouts; its `tokenizer` describes the one that their ids belong to.

    Raises:
        InputError: The chat template fails.
    """
    writer = (manifest or {}).get("tokenizer")
    writer = writer if isinstance(writer, dict) else {}
    rows = _rows(table)
    have_ids = any(row.completion_ids is not None for row in rows)
    sampled = have_ids and _same_ids(rows, tokenizer, writer)
    why = "their token ids belong to a different tokenizer" if have_ids and not sampled else "they have no token ids"
    prompts = _prompts(rows, tokenizer, writer, sampled)
    reader = _TextReader(tokenizer)
    completions = []
    for index, row in zip(table.index, rows, strict=True):
        if sampled and row.completion_ids is not None:
            completions.append(list(row.completion_ids))
        else:
            completions.append(reader.completion(int(index) + 1, row))
    print_once(reader.summary(why, len(rows)))
    return prompts, completions


@dataclass(frozen=True)
class _Row:
    """Fields of a rollout that are used here; None if unknown."""

    prompt: str
    prompt_text: str | None
    prompt_ids: Sequence[int] | None
    completion: str
    completion_ids: Sequence[int] | None
    finished: bool


def _rows(table: pd.DataFrame) -> list[_Row]:
    columns = [
        [None if cell is None or isinstance(cell, float) else cell for cell in table[name].tolist()]
        if name in table
        else [None] * len(table)
        for name in _Row.__dataclass_fields__
    ]
    return [_Row(*cells) for cells in zip(*columns, strict=True)]


def _same_ids(rows: Sequence[_Row], tokenizer: Any, writer: Mapping[str, Any]) -> bool:
    """True if the stored ids have the same meaning for `tokenizer` as for the model that sampled them."""
    if writer.get("sha256") == tokenizer_fingerprint(tokenizer):
        return True
    ends = {int(id_): token for id_, token in writer.get("ends", {}).items()}
    size = len(tokenizer)
    if any(id_ >= size or tokenizer.convert_ids_to_tokens(id_) != token for id_, token in ends.items()):
        return False
    prompts = {}
    for row in rows:
        if row.completion_ids is None:
            continue
        ids = list(row.completion_ids)
        if any(id_ >= size for id_ in ids):
            return False
        if decode(tokenizer, ids[:-1] if ids and ids[-1] in ends else ids) != row.completion:
            return False
        if row.prompt_ids is not None:
            prompts[row.prompt_text] = list(row.prompt_ids)
    return all(
        text is not None and ids in (encode_rendered(tokenizer, text, bare) for bare in (False, True))
        for text, ids in prompts.items()
    )


def _prompts(rows: Sequence[_Row], tokenizer: Any, writer: Mapping[str, Any], sampled: bool) -> list[list[int]]:
    """Encodes the prompts as they were rendered for sampling, if that is known and `tokenizer` has the tokens."""
    turns = chat_turns(tokenizer)
    unknown = [token for token in writer.get("control", []) if not turns.marks.fullmatch(token)]
    own = {prompt: render_prompt(tokenizer, prompt) for prompt in dict.fromkeys(row.prompt for row in rows)}
    encoded: dict[tuple[str, str | None], list[int]] = {}
    different = ""
    for row in rows:
        key = row.prompt, row.prompt_text
        if key in encoded:
            continue
        differs = row.prompt_text is not None and row.prompt_text != own[row.prompt]
        different = different or (str(row.prompt_text) if differs else "")
        if sampled and row.prompt_ids is not None:
            encoded[key] = list(row.prompt_ids)
        elif differs and not unknown:
            encoded[key] = encode_rendered(tokenizer, str(row.prompt_text), row.prompt_text == row.prompt)
        else:
            encoded[key] = encode_prompt(tokenizer, row.prompt)
    if different and unknown and not sampled:
        print_once(
            f"rollouts: their prompts contain {unknown[0]}, which is not a token of the base; training on the prompts"
            " in the base's own chat template"
        )
    elif different:
        print_once(
            f"rollouts: training on the prompts as rendered for sampling ({different[:60]!r}…); the base's own chat"
            " template, which is used for scoring, renders them differently"
        )
    return [encoded[row.prompt, row.prompt_text] for row in rows]


class _TextReader:
    """Encodes completions from their text, and counts what was added to them and found in them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.turns = chat_turns(tokenizer)
        self.counts: Counter[str] = Counter()
        self.prompts: dict[str, bool] = {}  # True if templated
        self.first_special = ""
        self.foreign_end = ""

    def completion(self, number: int, row: _Row) -> list[int]:
        """Encodes a row's completion."""
        ids, had_end = with_end(self.tokenizer, row.completion, row.finished)
        self.counts["read"] += 1
        self.counts["had an end" if had_end else "got one" if row.finished else "truncated"] += 1
        inner = decode(self.tokenizer, ids[:-1] if ids and ids[-1] in self.turns.ends else ids)
        self._note_special(f"row {number}", inner)
        foreign = _FOREIGN_END.search(row.completion)
        if foreign and not self.turns.marks.fullmatch(foreign.group(1)):
            self.counts["foreign"] += 1
            self.foreign_end = self.foreign_end or foreign.group(1)
        if row.prompt not in self.prompts:
            self.prompts[row.prompt] = is_templated(self.tokenizer, row.prompt)
            if not self.prompts[row.prompt]:
                self._note_special(f"row {number}, prompt", row.prompt)
        return ids

    def _note_special(self, where: str, text: str) -> None:
        if found := self.turns.special.search(text):
            self.counts["special"] += 1
            self.first_special = self.first_special or f"{found.group()} in {where}"

    def summary(self, why: str, total: int) -> str:
        """Summarises in one line how texts were encoded; empty if there were none."""
        counts = self.counts
        end = self.tokenizer.convert_ids_to_tokens(self.turns.end) if self.turns.end is not None else "nothing"
        templated = sum(self.prompts.values())
        parts = [
            f"{counts['got one']} get the end token {end}" * bool(counts["got one"]),
            f"{counts['had an end']} already have an end token" * bool(counts["had an end"]),
            f"{counts['truncated']} are truncated and get none" * bool(counts["truncated"]),
            f"{templated} prompts are already in the chat template" * bool(templated),
            f"{counts['special']} texts contain special tokens, which are encoded as such (first: {self.first_special})"
            * bool(counts["special"]),
            f"{counts['foreign']} end with {self.foreign_end}, which is plain text to the base"
            * bool(counts["foreign"]),
        ]
        summary = "; ".join(filter(None, parts))
        return f"rollouts: {why}; {counts['read']} of {total} are encoded from their text: {summary}" if summary else ""
