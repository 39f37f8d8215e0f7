"""Replaces an analysis atomically by a new one that extends it; one that has more is kept under another name."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losslens.analysis.pairs import Pair
from losslens.core.errors import InputError
from losslens.core.files import read_json, remove_leftovers, require_place, temporary_name
from losslens.core.hashing import hash_json
from losslens.runs.run import Run

_KEPT_AS = ".kept-as"  # file in an analysis being replaced: the name under which it will be kept


@dataclass(frozen=True)
class EarlierAnalysis:
    """The adapters and measured pairs of an existing analysis.

    Attributes:
        adapters: The hash of each adapter, by its name in that analysis.
        pairs: The pairs with connectivity and CKA, by these names.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    pairs: Sequence[Pair] = ()

    def pairs_among(self, adapters: Mapping[str, str]) -> list[Pair]:
        """Returns the measured pairs whose adapters are both in `adapters` (hash by name), by the names used there.

        Adapters are matched by hash, since names change when several sweeps are compared.
        """
        by_hash = {sha256: name for name, sha256 in reversed(list(adapters.items()))}
        pairs = []
        for pair in self.pairs:
            names = [
                name if adapters.get(name) == self.adapters.get(name) else by_hash.get(self.adapters.get(name, ""))
                for name in pair
            ]
            if None not in names and names[0] != names[1]:
                pairs.append((str(names[0]), str(names[1])))
        return pairs


def write_analysis(
    folder: Path, analyse: Callable[[EarlierAnalysis], tuple[Mapping[str, Any], Callable[[Path], None]]]
) -> None:
    """Writes an analysis to a temporary folder, which replaces `folder` atomically at the end.

    If another process has replaced `folder` in the meantime, the analysis is made again, with what that one measured.
    An analysis that has more than the new one is kept under another name, which is printed.

    Args:
        folder: The folder of the analysis.
        analyse: Makes the analysis, given the earlier one: returns the facts of its manifest, and what writes it.

    Raises:
        InputError: The folder cannot be written, or is a link.
    """
    require_place(folder)
    if folder.is_symlink():
        raise InputError(f"{folder}: a link, which the new analysis would replace; remove it")
    while True:
        finish_interrupted_replacement(folder)
        before = read_earlier(folder)
        facts, write = analyse(before)
        missing = missing_from(facts, before)
        with temporary_folder(folder) as new:
            write(new)
            if replace_analysis(new, folder, before, keep=bool(missing)):
                break
        print(f"{folder}: another analysis was written in the meantime; including what it measured", flush=True)
    if missing:
        print(
            f"{archive_path(folder, before.adapters)}: the previous analysis, kept because the new one lacks {missing}"
        )


def read_earlier(folder: Path) -> EarlierAnalysis:
    """Reads the analysis in `folder`; returns an empty one if there is none, or it was interrupted.

    Raises:
        InputError: Its manifest is damaged, so that what it has measured is not known.
    """
    file = folder / "manifest.json"
    if not file.exists():
        return EarlierAnalysis()
    try:
        manifest = read_json(file)
    except InputError as error:
        raise InputError(f"{error}; delete it to make the analysis anew, without what it alone has measured") from error
    with suppress(KeyError, TypeError, ValueError, AttributeError):
        return EarlierAnalysis(
            {str(name): str(sha256) for name, sha256 in manifest["adapters"].items()},
            [(str(a), str(b)) for a, b in manifest["measured_pairs"]],
        )
    return EarlierAnalysis()


def archive_path(folder: Path, adapters: Mapping[str, str]) -> Path:
    """Returns the path where an analysis of exactly these adapters is kept when one that lacks some replaces it."""
    runs = f"{len(adapters)}-run{'s' * (len(adapters) != 1)}"
    return folder.with_name(f"{folder.name}-of-{runs}-{hash_json(sorted(adapters.values()), 6)}")


def missing_from(facts: Mapping[str, Any], before: EarlierAnalysis) -> str:
    """Describes what the analysis `before` has but the new one (with these manifest facts) lacks; may be empty."""
    hashes = set(facts["adapters"].values())
    gone = [name for name, sha256 in before.adapters.items() if sha256 not in hashes]
    if gone:
        return f"{len(gone)} of its adapters ({', '.join(gone[:3])}{', …' * (len(gone) > 3)})"
    measured = {frozenset(pair) for pair in facts["measured_pairs"]}
    lost = [pair for pair in before.pairs_among(facts["adapters"]) if frozenset(pair) not in measured]
    return f"connectivity and CKA of {len(lost)} of its pairs" if lost else ""


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Creates a temporary folder next to `folder` for a new analysis; it is deleted on exit unless it was moved."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    new = temporary_name(folder)
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def replace_analysis(new: Path, folder: Path, before: EarlierAnalysis, keep: bool) -> bool:
    """Replaces `folder` by the analysis in `new`, unless `folder` changed since `before` was read.

    If the process is killed at any point, the old or the new analysis remains intact.

    Args:
        new: The folder from `temporary_folder`.
        folder: The folder to replace.
        before: The previous analysis, from `read_earlier`.
        keep: True to keep the previous analysis under another name.

    Returns:
        True if the folder was replaced.
    """
    with Run(folder).lock():
        _finish(folder)
        if read_earlier(folder) != before:
            return False
        kept = archive_path(folder, before.adapters) if keep else None
        if folder.exists():
            # Its new name is written into it first, for `finish_interrupted_replacement`.
            (folder / _KEPT_AS).unlink(missing_ok=True)
            if kept is not None:
                (folder / _KEPT_AS).write_text(kept.name, encoding="utf-8")
            folder.replace(_old(folder))
        try:
            new.replace(folder)
        except OSError as error:  # asked of the rename: NFS shows a folder late that another machine has made
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        _finish(folder)
    return True


def finish_interrupted_replacement(folder: Path) -> None:
    """Finishes a replacement whose process was killed in `replace_analysis`."""
    if _old(folder).exists() or (folder / _KEPT_AS).exists():
        with Run(folder).lock():  # another process may be replacing it
            _finish(folder)


def _finish(folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        (folder / _KEPT_AS).unlink(missing_ok=True)  # it was not moved
    if not old.exists():
        return
    if not folder.exists():
        old.replace(folder)
        (folder / _KEPT_AS).unlink(missing_ok=True)
        return
    name = (old / _KEPT_AS).read_text(encoding="utf-8", errors="replace") if (old / _KEPT_AS).is_file() else ""
    if not re.fullmatch(rf"{re.escape(folder.name)}-of-[\w-]+", name):
        name = ""
    # W&B's files, and any other files added to the folder.
    _carry_over(old, folder, ["wandb"] if name else [entry.name for entry in old.iterdir()])
    if not name:
        shutil.rmtree(old)
        return
    kept = folder.with_name(name)
    if kept.exists():  # an older analysis of the same adapters
        shutil.rmtree(kept)
    old.replace(kept)
    (kept / _KEPT_AS).unlink(missing_ok=True)


def _carry_over(old: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        if (old / name).exists() and not (folder / name).exists():
            (old / name).replace(folder / name)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
