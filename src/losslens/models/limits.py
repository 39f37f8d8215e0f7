"""What a model cannot take, found before anything is sampled or trained: too many positions, unknown tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from losslens.core.errors import InputError
from losslens.models.loading import ModelSource, load_config, load_tokenizer
from losslens.models.tokens import encode_prompt


@dataclass(frozen=True)
class Limits:
    """What a model takes.

    Attributes:
        model: Names it in messages.
        positions: Longest sequence, in tokens; None where its positions are relative.
        rows: Rows of its embedding: every token id is below; None if not known.
        tokenizer: Its tokenizer.
    """

    model: str
    positions: int | None
    rows: int | None
    tokenizer: Any

    def require_prompts(self, prompts: Iterable[str], max_tokens: int, field: str) -> None:
        """Refuses prompts that leave no room for an answer.

        Args:
            prompts: Users' turns.
            max_tokens: Of an answer.
            field: Of the configuration, that `max_tokens` is.

        Raises:
            InputError: A prompt holds a token that the model does not know, or is too long; or its template fails.
        """
        longest, length = "", 0
        for prompt in dict.fromkeys(prompts):
            ids = encode_prompt(self.tokenizer, prompt)
            self._require_rows(ids, f"the prompt {prompt[:40]!r}")
            if len(ids) > length:
                longest, length = prompt, len(ids)
        if self.positions is not None and length + max_tokens > self.positions:
            raise InputError(
                f"{field}={max_tokens}: the prompt {longest[:40]!r} has {length} tokens, "
                f"and {self.model} has {self.positions} positions for both"
            )

    def require_sequences(
        self,
        where: str,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Refuses prompts with completions that the model cannot be shown.

        Args:
            where: Their file, for messages.
            prompts: Token ids of each prompt.
            completions: Token ids of each completion.
            rows: Their places in the file, from 0; by default in order.

        Raises:
            InputError: One is too long, or holds a token that the model does not know.
        """
        places = range(len(prompts)) if rows is None else rows
        for place, prompt, completion in zip(places, prompts, completions, strict=True):
            number = place + 1
            length = len(prompt) + len(completion)
            if self.positions is not None and length > self.positions:
                raise InputError(
                    f"{where}: row {number}: {length} tokens (prompt {len(prompt)}, completion {len(completion)}), "
                    f"and {self.model} has {self.positions} positions"
                )
            self._require_rows(prompt, f"{where}: row {number}: the prompt")
            self._require_rows(completion, f"{where}: row {number}: the completion")

    def _require_rows(self, ids: Sequence[int], what: str) -> None:
        smallest, largest = min(ids, default=0), max(ids, default=0)
        if smallest < 0:
            raise InputError(f"{what} holds {smallest}, no token id")
        if self.rows is not None and largest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"{what} holds token {largest} ({token!r}), and the embedding of {self.model} has {self.rows} rows: "
                "its tokenizer is larger than the model"
            )


def limits_of(source: ModelSource) -> Limits:
    """The limits that a model's configuration declares.

    Raises:
        InputError: The model cannot be read.
    """
    config = load_config(source).get_text_config()
    rows = getattr(config, "vocab_size", None)
    return Limits(f"{source.field}={source.path}", _positions(config), rows, load_tokenizer(source))


def _positions(config: Any) -> int | None:
    """The longest sequence: declared, or as far as its rotary positions are scaled."""
    declared = getattr(config, "max_position_embeddings", None)
    if not isinstance(declared, int) or declared < 1 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    reach = declared
    for scaling in (rope, *(each for each in rope.values() if isinstance(each, dict))):
        # `longrope` and `llama3` declare the scaled length already.
        if scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic", "yarn"):
            original = scaling.get("original_max_position_embeddings") or declared
            reach = max(reach, int(original * float(scaling.get("factor") or 1)))
    return reach
