"""Damages of a file, and what a reader made of it."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from tests.faults.ledger import Outcome


def _content(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, random.Random], None]:
    def damage(file: Path, rng: random.Random) -> None:
        content = change(file.read_bytes(), rng)
        file.unlink()  # the original may be a hard link
        file.write_bytes(content)

    return damage


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _inserted(content: bytes, rng: random.Random, more: bytes) -> bytes:
    place = rng.randrange(len(content))
    return content[:place] + more + content[place:]


def _folder(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _dangling(file: Path, _: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def _unreadable(file: Path, _: random.Random) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)
    file.chmod(0)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "half": _content(lambda content, rng: content[: len(content) // 2]),
    "last byte missing": _content(lambda content, rng: content[:-1]),
    "emptied": _content(lambda content, rng: b""),
    "flipped bit": _content(_flipped),
    "NUL bytes": _content(lambda content, rng: _inserted(content, rng, bytes(16))),
    "no UTF-8": _content(lambda content, rng: _inserted(content, rng, b"\xff")),
    "[]": _content(lambda content, rng: b"[]"),
    "null": _content(lambda content, rng: b"null\n"),
    '"x"': _content(lambda content, rng: b'"x"'),
    "nested": _content(lambda content, rng: b"[" * 100_000),
    "a folder": _folder,
    "dangling link": _dangling,
    "no permission": _unreadable,
}


class _Capabilities(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """Makes permissions hold for this thread, also of root, who may otherwise read everything."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(header, before) == 0
    less = (_Capabilities * 2).from_buffer_copy(before)
    less[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def linked_copy(folder: Path, copy: Path) -> Path:
    """A copy of a folder whose files are hard links."""
    return shutil.copytree(folder, copy, copy_function=os.link)


def outcome_of(
    read: Callable[[], tuple[dict[str, Any], str]], expected: dict[str, Any], file: Path
) -> tuple[Outcome, str]:
    """Reads with a damaged file.

    Args:
        read: Returns values by name, and what was said: files that were left out, with the reasons.
        expected: The values of an undisturbed folder.
        file: The damaged file; a line that names its folder names it, too.
    """
    try:
        with bound_by_permissions():
            value, said = read()
    except (InputError, PermissionError, IsADirectoryError, NotADirectoryError) as error:  # as `core.jobs` tells them
        line = str(error)
        names = str(file) in line or str(file.parent) in line
        return ("clear line" if names and "\n" not in line else "traceback"), line
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if value == expected:
        return "same bytes", said
    changed = {name for name in value.keys() | expected.keys() if value.get(name) != expected.get(name)}
    lacking = all(name not in value for name in changed)
    names = file.name in said or str(file.parent) in said
    return ("clear line" if lacking and names else "different result"), f"{sorted(changed)}: {said}"
