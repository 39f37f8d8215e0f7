"""Limits of a model, checked before sampling or training: sequence length and vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from losslens.core.errors import InputError
from losslens.models.loading import ModelSource, load_config, load_tokenizer
from losslens.models.tokens import encode_prompt


@dataclass(frozen=True)
class Limits:
    """Sequence length and vocabulary of a model.

    Attributes:
        model: The model's name, for messages.
        positions: Maximum sequence length in tokens; None if unlimited or unknown.
        rows: Number of rows of the embedding, which exceeds every valid token id; None if unknown.
        tokenizer: The model's tokenizer.
    """

    model: str
    positions: int | None
    rows: int | None
    tokenizer: Any

    def require_prompts(self, prompts: Iterable[str], max_tokens: int, field: str) -> None:
        """Checks that prompts leave room for an answer.

        Args:
            prompts: User turns.
            max_tokens: Maximum length of an answer.
            field: Configuration key of `max_tokens`, for messages.

        Raises:
            InputError: A prompt is too long or contains a token that the model lacks, or the chat template fails.
        """
        longest, length = "", 0
        for prompt in dict.fromkeys(prompts):
            ids = encode_prompt(self.tokenizer, prompt)
            self._require_known(ids, f"the prompt {prompt[:40]!r}")
            if len(ids) > length:
                longest, length = prompt, len(ids)
        if self.positions is not None and length + max_tokens > self.positions:
            raise InputError(
                f"{field}={max_tokens} and the {length} tokens of the prompt {longest[:40]!r} exceed "
                f"the {self.positions} positions of {self.model}"
            )

    def require_sequences(
        self,
        where: str,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        rows: Sequence[int] | None = None,
    ) -> None:
        """Checks that the model can process prompts with their completions.

        Args:
            where: Their file, for messages.
            prompts: Token ids of each prompt.
            completions: Token ids of each completion.
            rows: Their row numbers in the file, from 0; by default consecutive.

        Raises:
            InputError: A sequence is too long or contains a token that the model lacks.
        """
        rows = range(len(prompts)) if rows is None else rows
        for row, prompt, completion in zip(rows, prompts, completions, strict=True):
            number = row + 1
            length = len(prompt) + len(completion)
            if self.positions is not None and length > self.positions:
                raise InputError(
                    f"{where}: row {number}: {length} tokens (prompt {len(prompt)}, completion {len(completion)}) "
                    f"exceed the {self.positions} positions of {self.model}"
                )
            self._require_known(prompt, f"{where}: row {number}: the prompt")
            self._require_known(completion, f"{where}: row {number}: the completion")

    def _require_known(self, ids: Sequence[int], what: str) -> None:
        smallest, largest = min(ids, default=0), max(ids, default=0)
        if smallest < 0:
            raise InputError(f"{what} contains {smallest}, which is not a token id")
        if self.rows is not None and largest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"{what} contains token {largest} ({token!r}), but the embedding of {self.model} has only {self.rows} "
                "rows: the tokenizer has more tokens than the model"
            )


def limits_of(source: ModelSource) -> Limits:
    """Reads a model's limits from its configuration.

    Raises:
        InputError: The model cannot be read.
    """
    config = load_config(source).get_text_config()
    rows = getattr(config, "vocab_size", None)
    return Limits(f"{source.field}={source.path}", _positions(config), rows, load_tokenizer(source))


def _positions(config: Any) -> int | None:
    """Returns the maximum sequence length: as declared, or as extended by scaling of rotary embeddings."""
    declared = getattr(config, "max_position_embeddings", None)
    if not isinstance(declared, int) or declared < 1 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    longest = declared
    for scaling in (rope, *(nested for nested in rope.values() if isinstance(nested, dict))):
        # For `longrope` and `llama3` the declared length is already the scaled one.
        if scaling.get("rope_type", scaling.get("type")) in ("linear", "dynamic", "yarn"):
            original = scaling.get("original_max_position_embeddings") or declared
            longest = max(longest, int(original * float(scaling.get("factor") or 1)))
    return longest
