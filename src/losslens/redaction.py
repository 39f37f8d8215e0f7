"""What is told to nobody: keys, the secret parts of addresses, the home folder; and text that would steer a terminal.

Used at the doors, not at each call: whatever is written as JSON (`files`), printed (`guard_streams`), or sent to W&B
(`shareable`) goes through here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_HIDDEN = "[redacted]"
_SHORTEST = 8  # characters of a secret: of shorter ones ordinary words would be hidden too
_NAMES_A_SECRET = re.compile(r"KEY$|TOKEN$|SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|AUTH$", re.IGNORECASE)
# Nobody's name for a dataset, a model or a loss: those a variable like MY_KEY=arithmetic must not hide.
_A_WORD = re.compile(r"[A-Za-z]?[a-z]+|[A-Z]+|\d+")
# In any address: what stands before the host, and what a query gives under a telling name.
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(r"([?&][^=&\s]*(?:key|token|secret|passw|sig|auth|code)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE)
# Parts of the path of a server's address that are no secret; whatever else stands there may be one.
_PLAIN_PATH = re.compile(
    r"v\d+\w{0,5}|api|openai|openapi|compatible-mode|inference|serve|models|engines|deployments|endpoints|llm|vllm|"
    r"sglang|proxy|gateway|paas|ai|chat|completions|public|serverless|beta|",
)
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# What a progress bar or a table may do: carriage return, colours, a line up, clearing the rest of the line.
_DRAWS = re.compile(r"\r|\x1b\[[0-9;]*m|\x1b\[[0-9]*[AK]")
_DRAWERS = ("tqdm", "rich")

_remembered: set[str] = set()
_paths: set[str] = set()  # of addresses: hidden but for their plain parts


def remember(secret: str | None) -> None:
    """Hides a text from now on: a key that was read by a name that says nothing of it."""
    if secret and len(secret) >= _SHORTEST:
        _remembered.add(secret)


def remember_address(url: str | None) -> None:
    """Hides from now on what may be secret in an address: user, password, query, and parts of its path."""
    if not url:
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    secrets = [parts.password, parts.query, *(part for part in parts.path.split("/") if not _is_plain(part))]
    for secret in secrets:
        remember(secret)
        remember(secret and unquote(secret))
    if plain_path(parts.path) != parts.path:
        _paths.add(parts.path)


def plain_address(url: str | None) -> str | None:
    """An address as it may be told: scheme, host, port, and of the path what is no secret."""
    if url is None:
        return None
    remember_address(url)
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{plain_path(parts.path)}"


def plain_path(path: str) -> str:
    """The path of an address with `…` for all that may be a secret."""
    return "/".join(part if _is_plain(part) else "…" for part in path.split("/"))


def _is_plain(part: str) -> bool:
    return _PLAIN_PATH.fullmatch(part) is not None


def redacted(value: Any) -> Any:
    """The same without any secret that is known, in every text of it, however deep."""
    return _mapped(value, _without_secrets)


def shareable(value: Any) -> Any:
    """What may leave this machine: `redacted`, with the home folder as `~`."""
    return _mapped(value, lambda text: _without_home(_without_secrets(text)))


def printable(text: str) -> str:
    r"""The text with what would steer a terminal written out, as `\x1b`; line ends and tabs stay."""
    return _STEERS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def guard_streams() -> None:
    """Has all that is printed from now on go through `redacted` and `printable`, to any terminal.

    What a terminal's encoding (latin-1, ASCII) cannot show is a ? there, where Python would stop with an error.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by a test, or closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not isinstance(sys.stdout, _Guarded):
        sys.stdout, sys.stderr = _Guarded(sys.stdout), _Guarded(sys.stderr)


class _Guarded:
    """A text stream that passes on what may be shown."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes `text` as it may be shown; a progress bar or a table may move the cursor and use colours."""
        drawer = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] in _DRAWERS
        text = _without_secrets(text)
        if drawer:
            shown = [printable(part) for part in _DRAWS.split(text)]
            drawn = [*_DRAWS.findall(text), ""]
            self._pass_on("".join(part for pair in zip(shown, drawn, strict=True) for part in pair))
        else:
            self._pass_on(printable(text))
        return len(text)

    def flush(self) -> None:
        """Flushes what was written."""
        self._pass_on("")

    def writelines(self, lines: Any) -> None:
        """Writes each."""
        for line in lines:
            self.write(line)

    def _pass_on(self, text: str) -> None:
        try:
            self._stream.write(text)
            if not text:
                self._stream.flush()
        except BrokenPipeError:
            # The reader has seen enough (`rollout.py | head -1`): the work goes on, and says nothing any more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(name, change): _mapped(entry, change) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(entry, change) for entry in value]
    return value


def _without_secrets(text: str) -> str:
    for path in sorted(_paths, key=len, reverse=True):
        text = text.replace(path, plain_path(path))
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    if "://" in text:
        text = _QUERY.sub(rf"\1{_HIDDEN}", _USERINFO.sub(f"{_HIDDEN}@", text))
    return text


def _secrets() -> list[str]:
    """All that are known, the longest first: one may be part of another."""
    return sorted(_remembered | _secrets_in(tuple(os.environ.items())), key=len, reverse=True)


@lru_cache(maxsize=4)  # asked for with every line that is printed
def _secrets_in(environment: tuple[tuple[str, str], ...]) -> frozenset[str]:
    found = set()
    for name, value in environment:
        if _NAMES_A_SECRET.search(name) and _looks_like_a_key(value):
            found.add(value)
        elif "://" in value and "@" in value:
            try:
                password = urlsplit(value).password
            except ValueError:
                continue
            if password and len(password) >= _SHORTEST:
                found.add(password)
    return frozenset(found)


def _looks_like_a_key(value: str) -> bool:
    return len(value) >= _SHORTEST and not _A_WORD.fullmatch(value) and not (value[0] in "/~." and _is_there(value))


def _is_there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _without_home(text: str) -> str:
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return text


def _homes() -> set[str]:
    """The paths of the home folder: none where nobody knows of one, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return set()
    return {str(home), str(home.resolve())} - {"/"}
