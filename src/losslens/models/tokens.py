"""Text and token ids: the one place where prompts are rendered, ends are put, and ids are read back.

What a model sampled is kept as ids, and trained on as such. Where only text exists, as in a file of one's own, its
ends, special tokens and templates are handled here, and one line says what was done.
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
from losslens.core.notices import say_once

if TYPE_CHECKING:
    import pandas as pd

_MARK = "losslens0text"  # stands for a text in a rendered template; no template changes it
_FOREIGN = re.compile(r"(</s>|<\|[^\s<>|]{1,40}\|>|<(?:eos|end_of_turn)>)\s*$")  # ends of other models' turns


@dataclass(frozen=True)
class Turns:
    """A tokenizer's way of beginning and ending turns.

    Attributes:
        end: The token that a finished turn of the assistant ends with, as its chat template writes it; None if unknown.
        ends: All tokens that a turn may end with.
        special: Matches its special tokens in a text.
        marks: Matches these and its other added tokens, but for words and space.
        own: Ids that it puts before a bare text.
        bos: What its chat template begins with: the BOS token, or nothing.
        opening: What its chat template writes before a user's text, from the first mark on.
        closing: What it writes after it, up to the end of the user's turn.
        header: What it writes after it, up to where the answer begins.
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
    """The `Turns` of a tokenizer, found once for each chat template that it is given.

    Raises:
        InputError: The chat template fails.
    """
    about = (repr(tokenizer.chat_template), tokenizer.eos_token, _declared_ends(tokenizer))
    known = _TURNS.get(tokenizer)
    if known is None or known[0] != about:
        known = _TURNS[tokenizer] = about, _find_turns(tokenizer)
    return known[1]


def declare_ends(tokenizer: Any, ids: int | Sequence[int] | None) -> None:
    """Notes the end tokens of a model's generation settings on its tokenizer, which is all that encoding has."""
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
    before, _, header = _rendered(tokenizer, [("user", _MARK)], True).partition(_MARK)
    try:
        closing = _rendered(tokenizer, [("user", _MARK)], False).partition(_MARK)[2]
        answered = _rendered(tokenizer, [("user", "a"), ("assistant", _MARK)], False).partition(_MARK)[2]
    except InputError:  # a template for prompts alone
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
    """What a tokenizer puts before a text. What its post-processor puts after one would come before the completion."""
    bare, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def _rendered(tokenizer: Any, messages: Sequence[tuple[str, str]], answer: bool) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(chat, add_generation_prompt=answer, tokenize=False))
    except Exception as error:  # whatever a template from elsewhere may raise
        where = f"{tokenizer.name_or_path}: its chat template fails"
        raise InputError(f"{where} on {messages[0][1][:40]!r} ({first_line(error)})") from error


def is_templated(tokenizer: Any, prompt: str) -> bool:
    """Whether `prompt` is in the tokenizer's chat template already: begins as one, or ends where an answer begins."""
    if tokenizer.chat_template is None:
        return False
    turns = chat_turns(tokenizer)
    text = prompt.strip().removeprefix(turns.bos or tokenizer.bos_token or "").lstrip()
    header = turns.header.strip()
    ended = header != "" and text.endswith(header)
    mark = turns.marks.match(turns.opening)
    # Without a mark of the tokenizer's only beginning and end together are no accident.
    began = text.startswith(mark.group() if mark else turns.opening) and bool(turns.opening)
    return (began and (mark is not None or ended)) or (ended and turns.marks.search(header) is not None)


def render_prompt(tokenizer: Any, prompt: str) -> str:
    """What the model is given: `prompt` as a user's turn, up to where the assistant's turn begins.

    A tokenizer without a chat template gives the bare text. A prompt that is in the chat template already is not put
    into it again; only the beginning of the answer is added, where it lacks that.

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
    """Token ids of `render_prompt`; a chat template writes its special tokens itself.

    Raises:
        InputError: The chat template fails.
    """
    return encode_rendered(tokenizer, render_prompt(tokenizer, prompt), tokenizer.chat_template is None)


def encode_rendered(tokenizer: Any, text: str, bare: bool) -> list[int]:
    """Token ids of what a model is given; a `bare` text gets what the tokenizer puts before one.

    What a tokenizer's post-processor puts after a text, as some do with EOS, would stand before the completion: never
    put. A BOS token stands there once, whoever writes it.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    own = list(chat_turns(tokenizer).own) if bare else []
    if ids[: len(own)] != own:
        ids = own + ids
    twice = tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2
    return ids[1:] if twice else ids


def encode_completion(tokenizer: Any, completion: str, finished: bool) -> list[int]:
    """Token ids of `completion`, with the token that ends a turn unless it was cut off before its end.

    A text that ends with an end token already gets no second one, and loses the padding that is written after it.
    """
    return _with_end(tokenizer, completion, finished)[0]


def _with_end(tokenizer: Any, completion: str, finished: bool) -> tuple[list[int], bool]:
    """As `encode_completion`; and whether the text ended with an end token itself."""
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    turns, pad = chat_turns(tokenizer), tokenizer.pad_token_id
    filling = {*turns.ends, pad}
    tail, own_end = len(ids), None
    while tail and (ids[tail - 1] in filling or not decode(tokenizer, ids[tail - 1 : tail]).strip()):
        tail -= 1
        own_end = tail if ids[tail] in turns.ends else own_end
    if own_end is not None:
        return ids[: own_end + 1], True
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ([*ids, turns.end] if finished and turns.end is not None else ids), False


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what token ids mean: the vocabulary, and the added and special tokens."""
    added = [(id_, str(token), bool(token.special)) for id_, token in tokenizer.added_tokens_decoder.items()]
    return hash_json([sorted(tokenizer.get_vocab().items()), sorted(added)], 64)


def describe_tokenizer(tokenizer: Any, prompts: Sequence[str]) -> dict[str, Any]:
    """What a manifest says of the tokenizer that its ids belong to: fingerprint, end tokens, and `prompts`' tokens."""
    turns = chat_turns(tokenizer)
    ends = {str(id_): tokenizer.convert_ids_to_tokens(id_) for id_ in sorted(turns.ends)}
    control = sorted({token for prompt in set(prompts) for token in turns.special.findall(prompt)})
    return {"sha256": tokenizer_fingerprint(tokenizer), "ends": ends, "control": control}


def read_server_completion(tokenizer: Any, prompt: str, completion: Completion) -> Completion:
    """A server's completion with the text of its ids, special tokens included; without ids that say something else.

    A server may leave special tokens out of its text, and may part a model's reasoning from its answer: special tokens,
    spaces and the marks of reasoning are not compared.

    Args:
        tokenizer: Whose ids they should be.
        prompt: The user's turn.
        completion: As the server gave it.
    """
    ids, prompt_ids, turns = completion.ids, completion.prompt_ids, chat_turns(tokenizer)
    size = len(tokenizer)
    if ids is None or not all(0 <= id_ < size for id_ in (*ids, *(prompt_ids or ()))):
        return _without_ids(completion)
    kept = ids[:-1] if ids and ids[-1] in turns.ends else ids
    said = {_squeezed(tokenizer.decode(list(kept), skip_special_tokens=skip)) for skip in (False, True)}
    if _squeezed(completion.text) not in said:
        return _without_ids(completion)
    if prompt_ids is not None and _squeezed(prompt) not in _squeezed(decode(tokenizer, prompt_ids)):
        return _without_ids(completion)
    if completion.finished and kept == ids and turns.end is not None:  # a server that does not give the end token
        ids = (*ids, turns.end)
    return replace(completion, text=decode(tokenizer, kept), ids=ids, tokens=len(ids))


def _without_ids(completion: Completion) -> Completion:
    return replace(completion, ids=None, prompt_ids=None)


def _squeezed(text: str) -> str:
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


def read_rollouts(
    table: pd.DataFrame, tokenizer: Any, manifest: Mapping[str, Any] | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompt and of the completion of each rollout; says once what is not read as it was sampled.

    Args:
        table: Frozen rollouts; `prompt_text`, `prompt_ids` and `completion_ids` may be missing or null.
        tokenizer: Of the base.
        manifest: Of the rollouts: `tokenizer` says which one their ids belong to.

    Raises:
        InputError: The chat template fails.
    """
    writer = (manifest or {}).get("tokenizer")
    writer = writer if isinstance(writer, dict) else {}
    rows = _rows(table)
    have_ids = any(row.completion_ids is not None for row in rows)
    sampled = have_ids and _same_ids(rows, tokenizer, writer)
    why = "their token ids are another tokenizer's" if have_ids and not sampled else "they have no token ids"
    prompts = _prompts(rows, tokenizer, writer, sampled)
    notes = _Notes(tokenizer)
    completions = []
    for place, row in zip(table.index, rows, strict=True):
        if sampled and row.completion_ids is not None:
            completions.append(list(row.completion_ids))
        else:
            completions.append(notes.completion(int(place) + 1, row))
    say_once(notes.told(why, len(rows)))
    return prompts, completions


@dataclass(frozen=True)
class _Row:
    """What of a rollout is read; None where it is not known."""

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
    """Whether the ids at hand mean to `tokenizer` what they meant to their writer."""
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
    """The prompts as their writer was given them, wherever that is known and `tokenizer` can read it."""
    turns = chat_turns(tokenizer)
    unread = [token for token in writer.get("control", []) if not turns.marks.fullmatch(token)]
    own = {prompt: render_prompt(tokenizer, prompt) for prompt in dict.fromkeys(row.prompt for row in rows)}
    found: dict[tuple[str, str | None], list[int]] = {}
    other = ""
    for row in rows:
        key = row.prompt, row.prompt_text
        if key in found:
            continue
        differs = row.prompt_text is not None and row.prompt_text != own[row.prompt]
        other = other or (str(row.prompt_text) if differs else "")
        if sampled and row.prompt_ids is not None:
            found[key] = list(row.prompt_ids)
        elif differs and not unread:
            found[key] = encode_rendered(tokenizer, str(row.prompt_text), row.prompt_text == row.prompt)
        else:
            found[key] = encode_prompt(tokenizer, row.prompt)
    if other and unread and not sampled:
        say_once(
            f"rollouts: their writer's prompts hold {unread[0]}, which is no token of the base: trained on the base's"
            " own rendering of them"
        )
    elif other:
        say_once(
            f"rollouts: trained on the prompts as their writer was given them ({other[:60]!r}…); the base's own chat"
            " template, which scores are asked in, writes them otherwise"
        )
    return [found[row.prompt, row.prompt_text] for row in rows]


class _Notes:
    """Reads completions from their text, and keeps count of what was done to them and found in them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.turns = chat_turns(tokenizer)
        self.counts: Counter[str] = Counter()
        self.prompts: dict[str, bool] = {}
        self.first = ""
        self.foreign = ""

    def completion(self, number: int, row: _Row) -> list[int]:
        """Token ids of a row's completion."""
        ids, had = _with_end(self.tokenizer, row.completion, row.finished)
        self.counts["read"] += 1
        self.counts["had an end" if had else "got one" if row.finished else "cut"] += 1
        inner = decode(self.tokenizer, ids[:-1] if ids and ids[-1] in self.turns.ends else ids)
        self._note_special(f"row {number}", inner)
        foreign = _FOREIGN.search(row.completion)
        if foreign and not self.turns.marks.fullmatch(foreign.group(1)):
            self.counts["foreign"] += 1
            self.foreign = self.foreign or foreign.group(1)
        if row.prompt not in self.prompts:
            self.prompts[row.prompt] = is_templated(self.tokenizer, row.prompt)
            if not self.prompts[row.prompt]:
                self._note_special(f"row {number}, prompt", row.prompt)
        return ids

    def _note_special(self, where: str, text: str) -> None:
        if found := self.turns.special.search(text):
            self.counts["special"] += 1
            self.first = self.first or f"{found.group()} in {where}"

    def told(self, why: str, total: int) -> str:
        """One line of it; empty when no text was read."""
        counts = self.counts
        end = self.tokenizer.convert_ids_to_tokens(self.turns.end) if self.turns.end is not None else "nothing"
        templated = sum(self.prompts.values())
        parts = [
            f"{counts['got one']} are ended with {end}" * bool(counts["got one"]),
            f"{counts['had an end']} have an end token themselves" * bool(counts["had an end"]),
            f"{counts['cut']} were cut and get no end" * bool(counts["cut"]),
            f"{templated} prompts are in the chat template already" * bool(templated),
            f"{counts['special']} texts hold special tokens, which are read as such (first: {self.first})"
            * bool(counts["special"]),
            f"{counts['foreign']} end with {self.foreign}, which is plain text to the base" * bool(counts["foreign"]),
        ]
        said = "; ".join(filter(None, parts))
        return f"rollouts: {why}; of {total}, {counts['read']} are read from their text: {said}" if said else ""
