"""What is told to nobody: keys, the secret parts of addresses, the home folder; and text that would steer a terminal.

Used at the doors, not at each call: whatever is written as JSON (`files`), printed (`guard_streams`), or sent to W&B
(`redact`) goes through here. Data (prompts, completions, answers) does not: of it only a key is hidden that a server
repeats (`without_key`). Nor does what tells a run from others, which is hashed again (`hash_secrets`).
"""

from __future__ import annotations

import hashlib
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
_QUERY = re.compile(
    r"([?&](?:[\w.-]*[_.-])?(?:(?:api|access|auth|subscription)?(?:key|token|secret)|passw(?:or)?d|sig(?:nature)?|auth|code)"
    r"=)[^&\s'\"]+",
    re.IGNORECASE,
)
# A key by its form alone: its maker's mark, a UUID, or letters and digits mixed as no name of a model mixes them.
_MARKED = re.compile(r"(?:sk|pk|rk|hf|gh[a-z]|gsk|xai|nvapi|tgp|glpat|xox[a-z])[-_](?=\S*\d)\S{12,}", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_OF_A_NAME = re.compile(r"[A-Za-z]+\d{0,4}[A-Za-z]?|\d+[A-Za-z]{0,2}|\d+[xX]\d+[A-Za-z]?")
_ODD = 12  # characters of such a mixture
# What tells a run from others and is compared with its identity, and names of things: hiding any would change it.
_IDENTITY = "identity"
_NAMING = {
    "run", "method", "options", "optim", "base", "model", "lora_rank", "lr", "name", "path", "folder", "repo", "writer",
    "teacher", "revision", "package",
}  # fmt: skip
# Parts of the path of a server's address that are no secret; whatever else stands there may be one.
_PLAIN_PATH = re.compile(
    r"v\d+\w{0,5}|api|openai|openapi|compatible-mode|inference|serve|models|engines|deployments|endpoints|llm|vllm|"
    r"sglang|proxy|gateway|paas|ai|chat|completions|public|serverless|beta|"
)
_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# What a progress bar or a table may do: carriage return, colours, a line up, clearing the rest of the line.
_DRAWS = re.compile(r"\r|\x1b\[[0-9;]*m|\x1b\[[0-9]*[AK]")
_DRAWERS = ("tqdm", "rich")

_remembered: set[str] = set()
_names: set[str] = set()
_paths: set[tuple[str, str]] = set()  # of addresses, host and path: hidden but for their plain parts


def remember_secret(secret: str | None) -> None:
    """Hides a text from now on: a key that was read by a name that says nothing of it."""
    if secret and _looks_like_a_key(secret):
        _remembered.add(secret)


def remember_name(name: str | None) -> None:
    """Never hides a text, nor a part of it: the name of a model, which may stand in an address too."""
    if name:
        _names.add(name)


def remember_address(url: str | None) -> None:
    """Hides from now on what may be secret in an address: user, password, query, and parts of its path."""
    if not url:
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    # Of the path alone what has the form of a key: the rest is hidden where the path stands, and is a word elsewhere.
    secrets = [parts.password, parts.query, *filter(looks_like_key, parts.path.split("/"))]
    for secret in secrets:
        remember_secret(secret)
        remember_secret(secret and unquote(secret))
    if public_path(parts.path) != parts.path:
        _paths.add((parts.netloc.rpartition("@")[2], parts.path.rstrip("/")))


def public_address(url: str | None) -> str | None:
    """An address as it may be told: scheme, host, port, and of the path what is no secret."""
    if url is None:
        return None
    remember_address(url)
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{public_path(parts.path)}"


def public_path(path: str) -> str:
    """The path of an address with `…` for all that may be a secret."""
    return "/".join(part if _PLAIN_PATH.fullmatch(part) else "…" for part in path.split("/"))


def looks_like_key(text: str) -> bool:
    """Whether a text is a key by its form alone: long, letters mixed with digits, or with the mark of a key's maker."""
    if _MARKED.fullmatch(text) or _UUID.fullmatch(text):
        return True
    odd = [run for run in re.findall(r"[A-Za-z0-9]+", text) if not _OF_A_NAME.fullmatch(run)]
    return sum(map(len, odd)) >= _ODD and any(c.isdigit() for c in text)


def without_key(text: str, key: str | None) -> str:
    """A completion without the key of its request; a placeholder (`none`, `not-needed`) is a word like others."""
    mixed = key is not None and any(c.isdigit() for c in key) and any(c.isalpha() for c in key)
    return text.replace(key, _HIDDEN) if key and mixed and _looks_like_a_key(key) else text


def hash_secrets(value: Any) -> Any:
    """Settings as they may stand in an identity: keys as a hash, told by their names and form alone.

    What is hashed to name a run or rollouts must be the same on every machine, whatever its environment holds, and the
    same when it is read again: it is written as it is.
    """
    if isinstance(value, Mapping):
        return {
            name: _hashed(entry)
            if isinstance(entry, str) and _NAMES_A_SECRET.search(str(name)) and len(entry) >= _SHORTEST
            else hash_secrets(entry)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [hash_secrets(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\w+://\S+", value):
        secret = _USERINFO.search(value) or _QUERY.search(value) or any(map(looks_like_key, value.split("/")))
        return _hashed(value) if secret else value
    return _hashed(value) if looks_like_key(value) and not re.search(r"[/\s]", value) else value


def _hashed(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def without_secrets(value: Any) -> Any:
    """The same without any secret that is known, in every text of it, however deep; `identity` stays as it is."""
    return _mapped(value, _without_secrets)


def redact(value: Any) -> Any:
    """What may leave this machine: `without_secrets`, with the home folder as `~`."""
    return _mapped(without_secrets(value), _without_home, everywhere=True)


def escape_control(text: str) -> str:
    r"""The text with what would steer a terminal written out, as `\x1b`; line ends and tabs stay."""
    return _STEERS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def guard_streams() -> None:
    """Has all that is printed from now on go through `without_secrets` and `escape_control`, to any terminal.

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
            shown = [escape_control(part) for part in _DRAWS.split(text)]
            drawn = [*_DRAWS.findall(text), ""]
            self._pass_on("".join(part for pair in zip(shown, drawn, strict=True) for part in pair))
        else:
            self._pass_on(escape_control(text))
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


def _mapped(value: Any, change: Callable[[str], str], everywhere: bool = False) -> Any:
    """The same with every text changed; unless `everywhere`, but for what names and identifies (`_entry`)."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _mapped(name, change): _mapped(entry, change, True) if everywhere else _entry(name, entry, change)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_mapped(entry, change, everywhere) for entry in value]
    return value


def _entry(name: Any, value: Any, change: Callable[[str], str]) -> Any:
    """What stands under a name: what identifies stays, of an address its plain parts."""
    if name == _IDENTITY:
        return value
    if name in _NAMING:
        return _mapped(value, lambda text: change(text) if "://" in text else text, everywhere=True)
    if name == "base_url" and isinstance(value, str):
        with suppress(ValueError):
            return change(public_address(value) or "")
    return _mapped(value, change)


def _without_secrets(text: str) -> str:
    for host, path in sorted(_paths, key=lambda each: len(each[1]), reverse=True):
        text = text.replace(host + path, host + public_path(path))
        # A server's error may name the path alone, which as one short word is also the end of many a folder's.
        if path.count("/") > 1 and not any(path in name for name in _names):
            text = text.replace(path, public_path(path))
    for secret in _secrets():
        text = text.replace(secret, _HIDDEN)
    if "://" in text:
        text = _QUERY.sub(rf"\1{_HIDDEN}", _USERINFO.sub(f"{_HIDDEN}@", text))
    return text


def _secrets() -> list[str]:
    """All that are known, the longest first: one may be part of another."""
    found = _remembered | _secrets_in(tuple(os.environ.items()))
    return sorted((s for s in found if not any(s in name for name in _names)), key=len, reverse=True)


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
