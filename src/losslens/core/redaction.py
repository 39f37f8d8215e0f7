"""Redaction of keys, of secret parts of addresses, of the home folder, and of terminal control characters.

Applied where text leaves the program, not at each call: to everything that is written as JSON (`files`), printed
(`guard_streams`) or sent to W&B (`redact`). Data (prompts, completions, answers) is exempt, apart from the request's
own key if a server repeats it (`remove_key`). Identities are exempt, too, since they are hashed again; they contain
hashes of keys instead (`hash_secrets`).
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

_HIDDEN = "[redacted]"
_MIN_SECRET_LENGTH = 8  # characters; hiding shorter ones would hide ordinary words, too
_SECRET_NAME = re.compile(r"KEY$|TOKEN$|SECRET|PASSW(OR)?D|PASSPHRASE|CREDENTIAL|AUTH$", re.IGNORECASE)
# A variable such as MY_KEY=arithmetic must not hide an ordinary word, which may name a dataset, model or loss.
_SINGLE_WORD = re.compile(r"[A-Za-z]?[a-z]+|[A-Z]+|\d+")
# Secret parts of any address: user and password, and values of query parameters with a suspicious name.
_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
_QUERY = re.compile(
    r"([?&](?:[\w.-]*[_.-])?(?:(?:api|access|auth|subscription)?(?:key|token|secret)|passw(?:or)?d|sig(?:nature)?|auth|code)"
    r"=)[^&\s'\"]+",
    re.IGNORECASE,
)
# Keys recognised by their form: a vendor's prefix, a UUID, or a mixture of letters and digits unlike a model's name.
_PREFIXED_KEY = re.compile(
    r"(?:sk|pk|rk|hf|gh[a-z]|gsk|xai|nvapi|tgp|glpat|xox[a-z])[-_](?=\S*\d)\S{12,}", re.IGNORECASE
)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NAME_PART = re.compile(r"[A-Za-z]+\d{0,4}[A-Za-z]?|\d+[A-Za-z]{0,2}|\d+[xX]\d+[A-Za-z]?")
_MIN_MIXED_LENGTH = 12  # characters of such a mixture
# Identities, and fields with names and paths that are compared with them: redaction must not change them.
_IDENTITY = "identity"
_NAME_FIELDS = {
    "run", "method", "options", "optim", "base", "model", "lora_rank", "lr", "name", "path", "folder", "repo", "writer",
    "teacher", "revision", "package",
}  # fmt: skip
# Parts of the path of a server's address that are known not to be secret; any other part may be.
_PLAIN_PATH = re.compile(
    r"v\d+\w{0,5}|api|openai|openapi|compatible-mode|inference|serve|models|engines|deployments|endpoints|llm|vllm|"
    r"sglang|proxy|gateway|paas|ai|chat|completions|public|serverless|beta|"
)
_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# Codes that progress bars and tables may use: carriage return, colours, cursor up, clearing the rest of the line,
# hiding the cursor and showing it again.
_DRAWING_CODES = re.compile(r"\r|\x1b\[[0-9;]*m|\x1b\[[0-9]*[AK]|\x1b\[\?25[hl]")
_DRAWING_PACKAGES = ("tqdm", "rich")

_remembered: set[str] = set()
_names: set[str] = set()
_paths: set[tuple[str, str]] = set()  # host and path of addresses, shown with their plain parts only


def remember_secret(secret: str | None) -> None:
    """Hides a text from now on: a key that the environment's names do not give away."""
    if secret and _may_be_secret(secret):
        _remembered.add(secret)


def remember_name(name: str | None) -> None:
    """Never hides a text or a part of it: the name of a model, which may also be part of an address."""
    if name:
        _names.add(name)


def remember_address(url: str | None) -> None:
    """Hides the parts of an address that may be secret from now on: user, password, query, and parts of the path."""
    if not url:
        return
    try:
        parts = urlsplit(url)
    except ValueError:
        return
    # Parts of the path count as secrets on their own only if they look like keys; the others are hidden in the path.
    secrets = [parts.password, parts.query, *filter(looks_like_key, parts.path.split("/"))]
    for secret in secrets:
        remember_secret(secret)
        remember_secret(secret and unquote(secret))
    if public_path(parts.path) != parts.path:
        _paths.add((parts.netloc.rpartition("@")[2], parts.path.rstrip("/")))


def public_address(url: str | None) -> str | None:
    """Returns the public parts of an address: scheme, host, port, and the plain parts of the path."""
    if url is None:
        return None
    remember_address(url)
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{public_path(parts.path)}"


def public_path(path: str) -> str:
    """Replaces the parts of an address's path that may be secret by `…`."""
    return "/".join(part if _PLAIN_PATH.fullmatch(part) else "…" for part in path.split("/"))


def looks_like_key(text: str) -> bool:
    """True if a text has the form of a key: long with letters and digits mixed, a UUID, or a vendor's prefix."""
    if _PREFIXED_KEY.fullmatch(text) or _UUID.fullmatch(text):
        return True
    mixed = [part for part in re.findall(r"[A-Za-z0-9]+", text) if not _NAME_PART.fullmatch(part)]
    return sum(map(len, mixed)) >= _MIN_MIXED_LENGTH and any(c.isdigit() for c in text)


def remove_key(text: str, key: str | None) -> str:
    """Removes the key of the request from a completion; a placeholder (`none`, `not-needed`) is an ordinary word."""
    mixed = key is not None and any(c.isdigit() for c in key) and any(c.isalpha() for c in key)
    return text.replace(key, _HIDDEN) if key and mixed and _may_be_secret(key) else text


def hash_secrets(value: Any) -> Any:
    """Replaces keys in settings by their hash, for an identity; recognises them by field name and form alone.

    An identity must be the same on every machine, whatever its environment contains, and the same when it is read
    back, so it is written without further redaction.
    """
    if isinstance(value, Mapping):
        return {
            name: _hash_secret(entry)
            if isinstance(entry, str) and _SECRET_NAME.search(str(name)) and len(entry) >= _MIN_SECRET_LENGTH
            else hash_secrets(entry)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [hash_secrets(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"\w+://\S+", value):
        secret = _USERINFO.search(value) or _QUERY.search(value) or any(map(looks_like_key, value.split("/")))
        return _hash_secret(value) if secret else value
    return _hash_secret(value) if looks_like_key(value) and not re.search(r"[/\s]", value) else value


def _hash_secret(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:16]}"


def remove_secrets(value: Any) -> Any:
    """Removes all known secrets from the texts of a nested value; leaves `identity` unchanged."""
    of_environment = _secrets_of_environment()  # once: reading the environment takes longer than most texts
    return _map_texts(value, lambda text: _without_secrets(text, of_environment))


def redact(value: Any) -> Any:
    """Prepares a nested value to leave this machine: `remove_secrets`, with the home folder as `~`."""
    return _map_texts(remove_secrets(value), _without_home, everywhere=True)


def escape_control(text: str) -> str:
    r"""Escapes terminal control characters, as in `\x1b`; keeps line ends and tabs."""
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def guard_streams() -> None:
    """Passes everything printed from now on through `remove_secrets` and `escape_control`.

    Characters that the terminal's encoding (latin-1, ASCII) lacks are printed as `?` instead of raising an error.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # replaced by a test, or closed
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not isinstance(sys.stdout, _RedactingStream):
        sys.stdout, sys.stderr = _RedactingStream(sys.stdout), _RedactingStream(sys.stderr)


class _RedactingStream:
    """A text stream that redacts what is written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes redacted `text`; progress bars and tables may move the cursor and use colours."""
        may_draw = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] in _DRAWING_PACKAGES
        text = _without_secrets(text, _secrets_of_environment())
        if may_draw:
            parts = [escape_control(part) for part in _DRAWING_CODES.split(text)]
            codes = [*_DRAWING_CODES.findall(text), ""]
            self._forward("".join(part for pair in zip(parts, codes, strict=True) for part in pair))
        else:
            self._forward(escape_control(text))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._forward("")

    def writelines(self, lines: Any) -> None:
        """Writes a list of lines."""
        for line in lines:
            self.write(line)

    def _forward(self, text: str) -> None:
        try:
            self._stream.write(text)
            if not text:
                self._stream.flush()
        except BrokenPipeError:
            # The reader has closed the pipe (`rollout.py | head -1`): the work continues without output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _map_texts(value: Any, change: Callable[[str], str], everywhere: bool = False) -> Any:
    """Applies `change` to every text of a nested value; unless `everywhere`, spares names and identities."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _map_texts(name, change): _map_texts(entry, change, True) if everywhere else _map_entry(name, entry, change)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_map_texts(entry, change, everywhere) for entry in value]
    return value


def _map_entry(name: Any, value: Any, change: Callable[[str], str]) -> Any:
    """Applies `change` to the value of a field; keeps identities and names, and shortens addresses."""
    if name == _IDENTITY:
        return value
    if name in _NAME_FIELDS:
        return _map_texts(value, lambda text: change(text) if "://" in text else text, everywhere=True)
    if name == "base_url" and isinstance(value, str):
        with suppress(ValueError):
            return change(public_address(value) or "")
    return _map_texts(value, change)


def _without_secrets(text: str, of_environment: frozenset[str]) -> str:
    for host, path in sorted(_paths, key=lambda address: len(address[1]), reverse=True):
        text = text.replace(host + path, host + public_path(path))
        # A server's error may contain the path alone; a path of one part could also be the end of a folder's path.
        if path.count("/") > 1 and not any(path in name for name in _names):
            text = text.replace(path, public_path(path))
    for secret in _longest_first(_remembered | of_environment):
        text = text.replace(secret, _HIDDEN)
    if "://" in text:
        text = _QUERY.sub(rf"\1{_HIDDEN}", _USERINFO.sub(f"{_HIDDEN}@", text))
    return text


def _secrets_of_environment() -> frozenset[str]:
    return _secrets_in(tuple(os.environ.items()))


def _longest_first(secrets: Set[str]) -> list[str]:
    """Sorts secrets, since one may be part of another; leaves out parts of names."""
    return sorted((s for s in secrets if not any(s in name for name in _names)), key=len, reverse=True)


@lru_cache(maxsize=4)  # called for every printed line
def _secrets_in(environment: tuple[tuple[str, str], ...]) -> frozenset[str]:
    secrets = set()
    for name, value in environment:
        if _SECRET_NAME.search(name) and _may_be_secret(value):
            secrets.add(value)
        elif "://" in value and "@" in value:
            try:
                password = urlsplit(value).password
            except ValueError:
                continue
            if password and len(password) >= _MIN_SECRET_LENGTH:
                secrets.add(password)
    return frozenset(secrets)


def _may_be_secret(value: str) -> bool:
    return (
        len(value) >= _MIN_SECRET_LENGTH
        and not _SINGLE_WORD.fullmatch(value)
        and not (value[0] in "/~." and _exists(value))
    )


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _without_home(text: str) -> str:
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    return text


def _homes() -> set[str]:
    """Returns the paths of the home folder; empty if it is unknown, as in some containers."""
    try:
        home = Path.home()
    except RuntimeError:
        return set()
    return {str(home), str(home.resolve())} - {"/"}
