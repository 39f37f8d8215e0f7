"""Folders of adapters, and the names that they have in tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from losslens.core.errors import InputError

AdapterPath = str | os.PathLike[str]


def named_adapters(folders: Mapping[str, AdapterPath] | Iterable[AdapterPath]) -> dict[str, Path]:
    """Returns the adapter folders by label; the default label is the shortest path suffix that is unique.

    Raises:
        InputError: A folder does not exist, or is given twice.
    """
    if isinstance(folders, (str, os.PathLike)):
        raise InputError(f"compare: {folders}: expected a list of folders, or a mapping of labels to folders")
    if isinstance(folders, Mapping):
        return {str(label): adapter_in(Path(folder)) for label, folder in folders.items()}
    paths = [Path(folder) for folder in folders]
    named = {}
    for path in paths:
        parts = path.expanduser().absolute().parts
        own = parts[:-1] if parts[-1] == "adapter" and len(parts) > 2 else parts
        others = [other.expanduser().absolute().parts for other in paths if other is not path]
        if parts in others:
            raise InputError(f"compare: {path}: given twice")
        others = [other[:-1] if other[-1] == "adapter" and len(other) > 2 else other for other in others]
        length = next(
            (n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own)
        )  # fmt: skip
        named["/".join(own[-length:])] = adapter_in(path)
    return named


def adapter_in(folder: Path) -> Path:
    """Returns the adapter's folder: that of a run stands for the adapter in it.

    Raises:
        InputError: There is no such folder.
    """
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise InputError(f"{folder}: no such home folder") from error
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    inside = folder / "adapter"
    is_run = not (folder / "adapter_config.json").exists() and (inside / "adapter_config.json").exists()
    return inside if is_run else folder


def adapters_below(folder: Path) -> dict[str, Path]:
    """Returns the adapter folders of a repository, wherever they are in it, by their paths in it.

    Raises:
        InputError: There is no such folder, or no adapter in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = sorted(file.parent for file in folder.rglob("adapter_config.json"))
    if not found:
        raise InputError(f"{folder}: no adapter_config.json in it or in its folders")
    return {path.relative_to(folder).as_posix(): path for path in found}
