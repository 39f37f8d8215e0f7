"""Completions, and the journal that stores them as they arrive."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.core.hashing import hash_json

_CHECKSUM, _DIGITS = "sha256", 16
# Fields of a journal entry from before token ids and checksums. It may have cost money, so it is still read.
_LEGACY_FIELDS: dict[str, Any] = {
    "key": str, "text": str, "tokens": (int, type(None)), "finished": bool, "prompt_tokens": (int, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """A model's completion of a prompt.

    Attributes:
        text: Decoded completion with its special tokens, without the end token. A server's text is kept as sent until
            `tokens.read_server_completion` decodes it from the ids.
        tokens: Number of tokens, including the end token; None if a server does not report it.
        finished: True if the model ended the completion, False if it was truncated.
        prompt_tokens: Number of prompt tokens, if a server reports it.
        ids: Token ids, including the end token; None if a server does not return them.
        prompt_ids: Token ids of the prompt as the server passed it to the model, if it returns them.
        sampler_logps: Log-probability in nats of each of `ids` under the distribution it was sampled from, after
            temperature and truncation; None if unknown, and for greedy decoding.
        sampler_raw_logps: The same at temperature 1 and without truncation.
    """

    text: str
    tokens: int | None
    finished: bool
    prompt_tokens: int | None = None
    ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None
    sampler_logps: tuple[float, ...] | None = None
    sampler_raw_logps: tuple[float, ...] | None = None


def report_truncation(completions: Sequence[Completion], what: str, field: str, limit: int) -> None:
    """Prints how many completions were truncated at the token limit, if at least a tenth of them were."""
    truncated = sum(not completion.finished for completion in completions)
    if truncated >= max(1, 0.1 * len(completions)):
        print(f"{what}: {truncated} of {len(completions)} completions were truncated ({field}={limit})", flush=True)


class Journal:
    """Completions stored on disk as they arrive, so that interrupted sampling resumes and none is paid for twice.

    One JSON object per line: the key of a request with its completion, or the state of the random generator after the
    preceding lines; each with a SHA-256 of its content and of the name of the file, which says what was asked. An
    incomplete last line is dropped. Earlier lines have a SHA-256 of their content alone and no log-probabilities, and
    legacy lines neither token ids nor a SHA-256.

    Args:
        file: Path of the journal; created if it does not exist.

    Raises:
        InputError: A line other than the last is damaged or of another journal, or the file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.completions: dict[str, Completion] = {}
        self.state: str | None = None
        self._completions_at_state: dict[str, Completion] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = file.read_bytes() if file.exists() else b""
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error
        complete = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:complete].split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                if not _is_legacy(entry):
                    checksum = entry.pop(_CHECKSUM, None)
                    if checksum not in (self._checksum(entry), hash_json(entry, _DIGITS)):
                        raise ValueError("wrong checksum")
                self._load(entry)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{file}: line {number} is damaged, of another journal, or was written by an older version; delete "
                    "the line to continue"
                ) from error
        self._handle = file.open("ab")
        self._handle.truncate(complete)

    def add(self, completions: Mapping[str, Completion], state: str | None = None) -> None:
        """Appends completions by the key of their request, and the generator's state after them; syncs to disk."""
        entries: list[dict[str, Any]] = [{"key": key, **asdict(c)} for key, c in completions.items()]
        if state is not None:
            entries.append({"state": state})
        lines = [json.dumps({**entry, _CHECKSUM: self._checksum(entry)}) + "\n" for entry in entries]
        self._handle.write("".join(lines).encode())
        self._handle.flush()
        os.fsync(self._handle.fileno())
        for entry in entries:
            self._load(entry)

    def _checksum(self, entry: dict[str, Any]) -> str:
        return hash_json([self.file.name, entry], _DIGITS)

    def up_to_state(self) -> dict[str, Completion]:
        """Returns the completions that precede the last stored generator state."""
        return dict(self._completions_at_state)

    def clear(self) -> None:
        """Deletes all entries."""
        self._handle.truncate(0)
        self.completions, self._completions_at_state, self.state = {}, {}, None

    def close(self) -> None:
        """Closes the file and keeps it."""
        self._handle.close()

    def done(self) -> None:
        """Deletes the file, once its completions are stored elsewhere."""
        self._handle.close()
        self.file.unlink(missing_ok=True)

    def _load(self, entry: dict[str, Any]) -> None:
        if "state" in entry:
            self.state, self._completions_at_state = entry["state"], dict(self.completions)
        else:
            lists = {name: entry[name] for name in ("ids", "prompt_ids")} if not _is_legacy(entry) else {}
            lists |= {name: entry.get(name) for name in ("sampler_logps", "sampler_raw_logps")}
            values = {name: entry[name] for name in ("text", "tokens", "finished", "prompt_tokens")}
            values |= {name: None if value is None else tuple(value) for name, value in lists.items()}
            self.completions[entry["key"]] = Completion(**values)


def _is_legacy(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == _LEGACY_FIELDS.keys()
        and all(isinstance(entry[name], kind) for name, kind in _LEGACY_FIELDS.items())
    )
