"""One analysis takes the place of another as a whole, extends it, and never destroys one that has more."""

from __future__ import annotations

import os
import platform
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losslens.analysis.pairs import Pair
from losslens.core.errors import InputError
from losslens.core.files import read_json
from losslens.core.hashing import hash_json
from losslens.runs.run import Run

_KEPT_AS = ".kept-as"  # in an analysis on its way aside: the name it is to have there


@dataclass(frozen=True)
class Earlier:
    """The adapters and the measured pairs of an analysis that is written.

    Attributes:
        adapters: The hash of each adapter, by its name there.
        pairs: The pairs with connectivity and CKA, by these names.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    pairs: Sequence[Pair] = ()

    def pairs_among(self, adapters: Mapping[str, str]) -> list[Pair]:
        """The measured pairs whose two adapters are among `adapters` (hash by name), by the names there.

        A sweep's runs have other names beside those of a second sweep: what counts is the adapter.
        """
        by_hash = {sha256: name for name, sha256 in reversed(list(adapters.items()))}
        found = []
        for pair in self.pairs:
            here = [
                name if adapters.get(name) == self.adapters.get(name) else by_hash.get(self.adapters.get(name, ""))
                for name in pair
            ]
            if None not in here and here[0] != here[1]:
                found.append((str(here[0]), str(here[1])))
        return found


def earlier(folder: Path) -> Earlier:
    """The analysis in `folder`; an empty one where there is none, or none that came to its end."""
    with suppress(InputError, KeyError, TypeError, ValueError, AttributeError):
        manifest = read_json(folder / "manifest.json")
        return Earlier(
            {str(name): str(sha256) for name, sha256 in manifest["adapters"].items()},
            [(str(a), str(b)) for a, b in manifest["measured_pairs"]],
        )
    return Earlier()


def kept_aside(folder: Path, adapters: Mapping[str, str]) -> Path:
    """Where an analysis of exactly these adapters is kept when one that lacks some takes its place in `folder`."""
    runs = f"{len(adapters)}-run{'s' * (len(adapters) != 1)}"
    return folder.with_name(f"{folder.name}-of-{runs}-{hash_json(sorted(adapters.values()), 6)}")


def missing_from(facts: Mapping[str, Any], before: Earlier) -> str:
    """What the analysis `before` has and the new one, with these facts for its manifest, has not; may be empty."""
    hashes = set(facts["adapters"].values())
    gone = [name for name, sha256 in before.adapters.items() if sha256 not in hashes]
    if gone:
        return f"{len(gone)} of its adapters ({', '.join(gone[:3])}{', …' * (len(gone) > 3)})"
    measured = {frozenset(pair) for pair in facts["measured_pairs"]}
    lost = [pair for pair in before.pairs_among(facts["adapters"]) if frozenset(pair) not in measured]
    return f"connectivity and CKA of {len(lost)} of its pairs" if lost else ""


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write an analysis into; gone at the end, unless it has taken the place."""
    mine = f".{folder.name}.{platform.node()}-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{mine}*.tmp"):
        if not _is_alive(left.name.removeprefix(mine).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    new = folder.with_name(f"{mine}{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def take_place(new: Path, folder: Path, before: Earlier, keep: bool) -> bool:
    """Puts the analysis in `new` where `folder` is, unless another one was put there since `before` was read.

    Killed at any point it leaves the old one or the new one, whole.

    Args:
        new: From `beside`.
        folder: The place.
        before: What was there, from `earlier`.
        keep: Whether what was there is kept aside.

    Returns:
        Whether it has been done.
    """
    with Run(folder).lock():
        _settle(folder)
        if earlier(folder) != before:
            return False
        kept = kept_aside(folder, before.adapters) if keep else None
        if folder.exists():
            # Where it is to stay is written into it first, for whoever settles what is cut off here.
            (folder / _KEPT_AS).unlink(missing_ok=True)
            if kept is not None:
                (folder / _KEPT_AS).write_text(kept.name, encoding="utf-8")
            folder.replace(_old(folder))
        new.replace(folder)
        _settle(folder)
    return True


def settle(folder: Path) -> None:
    """Brings to its end what a process that was killed in `take_place` had begun."""
    if _old(folder).exists() or (folder / _KEPT_AS).exists():
        with Run(folder).lock():  # another process may be about it
            _settle(folder)


def _settle(folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        (folder / _KEPT_AS).unlink(missing_ok=True)  # it was not moved away
    if not old.exists():
        return
    if not folder.exists():
        old.replace(folder)
        (folder / _KEPT_AS).unlink(missing_ok=True)
        return
    name = (old / _KEPT_AS).read_text(encoding="utf-8", errors="replace") if (old / _KEPT_AS).is_file() else ""
    if not re.fullmatch(rf"{re.escape(folder.name)}-of-[\w-]+", name):
        name = ""
    # W&B's files, and whatever somebody else has put there.
    _carry_over(old, folder, ["wandb"] if name else [entry.name for entry in old.iterdir()])
    if not name:
        shutil.rmtree(old)
        return
    kept = folder.with_name(name)
    if kept.exists():  # the same adapters, kept aside before
        shutil.rmtree(kept)
    old.replace(kept)
    (kept / _KEPT_AS).unlink(missing_ok=True)


def _carry_over(old: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (old / name).exists() and not (folder / name).exists():
            (old / name).replace(folder / name)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
