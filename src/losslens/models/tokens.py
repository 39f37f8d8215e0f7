"""Text and token ids: rendering of prompts, end tokens, and encoding and decoding of completions.

Sampled completions are stored as token ids and trained on as such. For rollouts that exist only as text, as in a user's
file, this module handles end tokens, special tokens and templates, and summarises what was done in one line.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from losslens.core.completions import Completion
from losslens.core.errors import InputError, first_line
from losslens.core.hashing import hash_json
from losslens.core.notices import print_once

if TYPE_CHECKING:
    import pandas as pd

_PLACEHOLDER = "losslens0text"  # marks the position of a text in a rendered template; no template changes it
_FOREIGN_END = re.compile(r"(</s>|<\|[^\s<>|]{1,40}\|>|<(?:eos|end_of_turn)>)\s*$")  # end tokens of other models


@dataclass(frozen=True)
class Turns:
    """Markup of chat turns by a tokenizer and its chat template.

    Attributes:
        end: Token that ends a finished assistant turn in the chat template; None if unknown.
        ends: All tokens that may end a turn.
        special: Matches special tokens in a text.
        marks: Matches special tokens and other added tokens that are not words or whitespace.
        own: Ids that the tokenizer puts before a bare text.
        bos: BOS token at the beginning of the chat template, or empty.
        opening: Markup before the user's text, from the first mark on.
        closing: Markup after the user's text, up to the end of the user's turn.
        header: Markup after the user's text, up to the beginning of the answer.
    """

    end: int | None
    ends: frozenset[int]
    special: re.Pattern[str]
    marks: re.Pattern[str]
    own: tuple[int, ...]
    bos: str = ""
    opening: str = ""
    closing: str = ""
    header: str = ""


_TURNS: WeakKeyDictionary[Any, tuple[Any, Turns]] = WeakKeyDictionary()


def chat_turns(tokenizer: Any) -> Turns:
    """Returns the `Turns` of a tokenizer, cached until its chat template or end tokens change.

    Raises:
        InputError: The chat template fails.
    """
    key = (repr(tokenizer.chat_template), tokenizer.eos_token, _declared_ends(tokenizer))
    cached = _TURNS.get(tokenizer)
    if cached is None or cached[0] != key:
        cached = _TURNS[tokenizer] = key, _find_turns(tokenizer)
    return cached[1]


def declare_ends(tokenizer: Any, ids: int | Sequence[int] | None) -> None:
    """Stores the end tokens of a model's generation settings on its tokenizer, for use in encoding."""
    tokenizer.declared_ends = tuple([ids] if isinstance(ids, int) else ids or [])


def _declared_ends(tokenizer: Any) -> tuple[int, ...]:
    return getattr(tokenizer, "declared_ends", ())


def _find_turns(tokenizer: Any) -> Turns:
    added = tokenizer.added_tokens_decoder.values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    marks = special | {str(token) for token in added if not re.fullmatch(r"\w+", str(token))}
    eos, declared = tokenizer.eos_token_id, _declared_ends(tokenizer)
    end = eos if eos in declared or not declared else declared[0]
    ends = {id_ for id_ in (eos, *declared) if id_ is not None}
    plain = Turns(end, frozenset(ends), _any_of(special), _any_of(marks), _own_prefix(tokenizer))
    if tokenizer.chat_template is None:
        return plain
    before, _, header = _rendered(tokenizer, [("user", _PLACEHOLDER)], True).partition(_PLACEHOLDER)
    try:
        closing = _rendered(tokenizer, [("user", _PLACEHOLDER)], False).partition(_PLACEHOLDER)[2]
        answered = _rendered(tokenizer, [("user", "a"), ("assistant", _PLACEHOLDER)], False).partition(_PLACEHOLDER)[2]
    except InputError:  # the template supports only prompts
        closing = answered = ""
    written = plain.marks.match(answered.lstrip())
    if written is not None:
        end = tokenizer.convert_tokens_to_ids(written.group())
    bos = tokenizer.bos_token if tokenizer.bos_token and before.startswith(tokenizer.bos_token) else ""
    before = before.removeprefix(bos)
    first = plain.marks.search(before)
    opening = before[first.start() :] if first else before.strip()
    ends |= {end} - {None}
    return replace(plain, end=end, ends=frozenset(ends), bos=bos, opening=opening, closing=closing, header=header)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _own_prefix(tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids that a tokenizer puts before a text; those it puts after one must not precede a completion."""
    bare, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def _rendered(tokenizer: Any, messages: Sequence[tuple[str, str]], answer: bool) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=answer, tokenize=False))
    except Exception as error:  # a template can raise anything
        where = f"{tokenizer.name_or_path}: the chat template fails"
        raise InputError(f"{where} on {messages[0][1][:40]!r} ({first_line(error)})") from error


def is_templated(tokenizer: Any, prompt: str) -> bool:
    """True if `prompt` is already in the tokenizer's chat template: begins or ends with its markup."""
    if tokenizer.chat_template is None:
        return False
    turns = chat_turns(tokenizer)
    text = prompt.strip().removeprefix(turns.bos or tokenizer.bos_token or "").lstrip()
    header = turns.header.strip()
    has_header = header != "" and text.endswith(header)
    mark = turns.marks.match(turns.opening)
    # If the markup contains no added token, only a matching beginning and end together are conclusive.
    has_opening = text.startswith(mark.group() if mark else turns.opening) and bool(turns.opening)
    return (has_opening and (mark is not None or has_header)) or (has_header and turns.marks.search(header) is not None)


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """Renders `prompt` as a user turn, up to the beginning of the assistant's turn.

    Without a chat template, returns the bare text. A prompt that is already in the chat template is not rendered again;
    only a missing header of the assistant's turn is added.

    Raises:
        InputError: The chat template fails.
    """
    if tokenizer.chat_template is None:
        return prompt
    if not is_templated(tokenizer, prompt):
        return _rendered(tokenizer, [("user", prompt)], True)
    turns, text = chat_turns(tokenizer), prompt.rstrip()
    for tail in (turns.header.rstrip(), turns.closing.rstrip()):
        if tail and text.endswith(tail):
            prompt = text.removesuffix(tail) + turns.header
            break
    return prompt if prompt.startswith(turns.bos) else turns.bos + prompt


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Encodes a prompt as `render_prompt` renders it; a chat template contains its own special tokens.

    Raises:
        InputError: The chat template fails.
    """
    return encode_rendered(tokenizer, render_prompt(tokenizer, prompt), tokenizer.chat_template is None)


def encode_rendered(tokenizer: Any, text: str, bare: bool) -> list[int]:
    """Encodes a rendered prompt; a `bare` text is preceded by the ids that the tokenizer puts before a text.

    Tokens that a tokenizer's post-processor appends to a text, such as EOS, are omitted, since they would precede the
    completion. A BOS token is never duplicated.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = list(chat_turns(tokenizer).own) if bare else []
    if ids[: len(own)] != own:
        ids = own + ids
    twice = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if twice else ids


def encode_completion(tokenizer: Any, completion: str, finished: bool) -> list[int]:
    """Encodes `completion`, followed by the end token unless the completion is truncated.

    A text that already ends with an end token gets no second one, and any padding after it is removed.
    """
    return _with_end(tokenizer, completion, finished)[0]


def _with_end(tokenizer: Any, completion: str, finished: bool) -> tuple[list[int], bool]:
    """Encodes like `encode_completion`; also returns True if the text itself ends with an end token."""
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    turns, pad = chat_turns(tokenizer), tokenizer.pad_token_id
    trailing = {*turns.ends, pad}
    tail, own_end = len(ids), None
    while tail and (ids[tail - 1] in trailing or not decode(tokenizer, ids[tail - 1 : tail]).strip()):
        tail -= 1
        own_end = tail if ids[tail] in turns.ends else own_end
    if own_end is not None:
        return ids[: own_end + 1], True
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ([*ids, turns.end] if finished and turns.end is not None else ids), False


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes token ids, including special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Computes the SHA-256 of the meaning of token ids: the vocabulary, and the added and special tokens."""
    added = [(id_, str(token), bool(token.special)) for id_, token in tokenizer.added_tokens_decoder.items()]
    return hash_json([sorted(tokenizer.get_vocab().items()), sorted(added)], 64)


def describe_tokenizer(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """Describes the tokenizer of stored ids, for a manifest: fingerprint, end tokens, special tokens in `prompts`."""
    turns = chat_turns(tokenizer)
    ends = {str(id_): tokenizer.convert_ids_to_tokens(id_) for id_ in sorted(turns.ends)}
    control = sorted({token for prompt in set(prompts) for token in turns.special.findall(prompt)})
    return {"sha256": tokenizer_fingerprint(tokenizer), "ends": ends, "control": control}


def read_server_completion(tokenizer: Any, prompt: str, completion: Completion) -> Completion:
    """Decodes a server's completion from its token ids; drops ids that do not match the server's text.

    A server may omit special tokens from its text and return a model's reasoning separately, so special tokens,
    whitespace and reasoning tags are ignored in the comparison. If it omits the end token, that is added, and the
    log-probabilities, which would lack one, are dropped.

    Args:
        tokenizer: Tokenizer that the ids should belong to.
        prompt: The user turn.
        completion: The server's completion.
    """
    ids, prompt_ids, turns = completion.ids, completion.prompt_ids, chat_turns(tokenizer)
    size = len(tokenizer)
    if ids is None or not all(0 <= id_ < size for id_ in (*ids, *(prompt_ids or ()))):
        return _without_ids(completion)
    kept = ids[:-1] if ids and ids[-1] in turns.ends else ids
    decoded = {_comparable(tokenizer.decode(list(kept), skip_special_tokens=skip)) for skip in (False, True)}
    if _comparable(completion.text) not in decoded:
        return _without_ids(completion)
    if prompt_ids is not None and _comparable(prompt) not in _comparable(decode(tokenizer, prompt_ids)):
        return _without_ids(completion)
    completion = replace(completion, text=decode(tokenizer, kept))
    if completion.finished and kept == ids and turns.end is not None:  # the server omits the end token
        completion, ids = _without_logps(completion), (*ids, turns.end)
    return replace(completion, ids=ids, tokens=len(ids))


def _without_ids(completion: Completion) -> Completion:
    return replace(_without_logps(completion), ids=None, prompt_ids=None)


def _without_logps(completion: Completion) -> Completion:
    return replace(completion, sampler_logps=None, sampler_raw_logps=None)


def _comparable(text: str) -> str:
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


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
        ids, had_end = _with_end(self.tokenizer, row.completion, row.finished)
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
