"""A completion, whoever wrote it, and the journal that keeps completions as they arrive."""

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
# A line of before there were token ids and checksums: what it holds was paid for, and stays.
_OF_BEFORE: dict[str, Any] = {
    "key": str, "text": str, "tokens": (int, type(None)), "finished": bool, "prompt_tokens": (int, type(None)),
}  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt.

    Attributes:
        text: The decoded completion, special tokens included, but for the token that ended it; a server's is as the
            server writes it until `tokens.read_server_completion` has read it from its ids.
        tokens: Number of tokens, the one that ended it included; None where a server does not say.
        finished: Whether the model ended it; False when it was cut.
        prompt_tokens: Number of tokens of the prompt, where a server says so.
        ids: The tokens themselves, the one that ended it included; None where a server does not give them.
        prompt_ids: Those of the prompt as a server gave it to its model, where it says so.
    """

    text: str
    tokens: int | None
    finished: bool
    prompt_tokens: int | None = None
    ids: tuple[int, ...] | None = None
    prompt_ids: tuple[int, ...] | None = None


def report_truncation(completions: Sequence[Completion], what: str, field: str, limit: int) -> None:
    """Prints how many completions were cut at the token limit, when it is a tenth of them or more."""
    cut = sum(not completion.finished for completion in completions)
    if cut >= max(1, 0.1 * len(completions)):
        print(f"{what}: {cut} of {len(completions)} completions were cut ({field}={limit})", flush=True)


class Journal:
    """Completions on disk as they arrive, so that what was interrupted goes on, and nothing is paid for twice.

    One JSON object a line: the key of the request and its completion, or the state of the random generator after the
    lines before it, each with the SHA-256 of what it says. A last line that was cut off is dropped. Lines of before
    there were token ids have none, and no SHA-256.

    Args:
        file: Where.

    Raises:
        InputError: Another line than the last is not what was written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.completions: dict[str, Completion] = {}
        self.state: str | None = None
        self._at_state: dict[str, Completion] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        content = file.read_bytes() if file.exists() else b""
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                entry = json.loads(line)
                if not _is_of_before(entry):
                    checksum = entry.pop(_CHECKSUM, None)
                    if checksum != hash_json(entry, _DIGITS):
                        raise ValueError("another checksum")
                self._take(entry)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise InputError(
                    f"{file}: line {number}: not what was written, or written by an older version; "
                    "delete the line to go on"
                ) from error
        self._handle = file.open("ab")
        self._handle.truncate(whole)

    def add(self, completions: Mapping[str, Completion], state: str | None = None) -> None:
        """Keeps completions by the key of their request, and the generator's state after them."""
        entries: list[dict[str, Any]] = [{"key": key, **asdict(c)} for key, c in completions.items()]
        if state is not None:
            entries.append({"state": state})
        lines = [json.dumps({**entry, _CHECKSUM: hash_json(entry, _DIGITS)}) + "\n" for entry in entries]
        self._handle.write("".join(lines).encode())
        self._handle.flush()
        os.fsync(self._handle.fileno())
        for entry in entries:
            self._take(entry)

    def up_to_state(self) -> dict[str, Completion]:
        """The completions that were there when the last state was kept."""
        return dict(self._at_state)

    def clear(self) -> None:
        """Forgets everything."""
        self._handle.truncate(0)
        self.completions, self._at_state, self.state = {}, {}, None

    def close(self) -> None:
        """Closes the file and leaves it."""
        self._handle.close()

    def done(self) -> None:
        """Removes the file: the completions are kept elsewhere now."""
        self._handle.close()
        self.file.unlink(missing_ok=True)

    def _take(self, entry: dict[str, Any]) -> None:
        if "state" in entry:
            self.state, self._at_state = entry["state"], dict(self.completions)
        else:
            values: dict[str, Any] = {"ids": None, "prompt_ids": None} if _is_of_before(entry) else {}
            values |= {name: entry[name] for name in Completion.__dataclass_fields__ if name not in values}
            for name in ("ids", "prompt_ids"):
                values[name] = None if values[name] is None else tuple(values[name])
            self.completions[entry["key"]] = Completion(**values)


def _is_of_before(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == _OF_BEFORE.keys()
        and all(isinstance(entry[name], kind) for name, kind in _OF_BEFORE.items())
    )
