"""Folders of adapters and whole models, and the names that they have in tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from losslens.core.errors import InputError

# Folders of a run for what it trained.
_ROOMS = ("adapter", "model")

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
        own = _without_room(parts)
        others = [other.expanduser().absolute().parts for other in paths if other is not path]
        if parts in others:
            raise InputError(f"compare: {path}: given twice")
        others = [_without_room(other) for other in others]
        length = next(
            (n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own)
        )  # fmt: skip
        named["/".join(own[-length:])] = adapter_in(path)
    return named


def _without_room(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Leaves out the last part of the path of a run's weights, which is the same for all runs."""
    return parts[:-1] if parts[-1] in _ROOMS and len(parts) > 2 else parts


def adapter_in(folder: Path) -> Path:
    """Returns the folder of an adapter or whole model: that of a run stands for the one in it.

    Raises:
        InputError: There is no such folder.
    """
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise InputError(f"{folder}: no such home folder") from error
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    configs = {"adapter": "adapter_config.json", "model": "config.json"}
    if any((folder / config).exists() for config in configs.values()):
        return folder
    inside = [folder / room for room, config in configs.items() if (folder / room / config).exists()]
    return inside[0] if inside else folder


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
