"""Text and token ids: rendering of prompts, end tokens, and encoding and decoding of completions.

Sampled completions are stored as token ids and trained on as such (`rollouts/token_ids.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from losslens.core.completions import Completion
from losslens.core.errors import InputError, first_line
from losslens.core.hashing import hash_json

_PLACEHOLDER = "losslens0text"  # marks the position of a text in a rendered template; no template changes it


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
    return with_end(tokenizer, completion, finished)[0]


def with_end(tokenizer: Any, completion: str, finished: bool) -> tuple[list[int], bool]:
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
