"""Adapters that a command line names: folders, repositories on the hub, and their names in the tables."""

from __future__ import annotations

import re
from pathlib import Path

from losslens.core.errors import InputError


def published_adapters(place: str) -> dict[str, Path]:
    """Returns the adapters of a repository on the hub, or of a folder laid out like one, by their names in the tables.

    Args:
        place: The repository or the folder; empty for the repository of the study.

    Raises:
        InputError: There is no adapter in it, or two would have one name.
        UnavailableError: The hub cannot be reached, and there is no local copy.
    """
    from losslens.core.hub import repository_from_hub
    from losslens.report.published import REPOSITORY
    from losslens.updates.places import adapters_below

    place = place or REPOSITORY
    named: dict[str, Path] = {}
    for path, folder in adapters_below(folder_at(place) or repository_from_hub(place)).items():
        if (label := label_of(path)) in named:
            raise InputError(f"{place}: two of its adapters would be named {label}")
        named[label] = folder
    return named


def label_of(path: str) -> str:
    """Returns the end of a path in the letters that names in the tables may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path)[-100:].strip("-._") or "adapter"


def folder_at(place: str) -> Path | None:
    """Returns the folder of that name, None if there is none.

    Raises:
        InputError: It names a home folder that does not exist.
    """
    try:
        folder = Path(place).expanduser()
    except RuntimeError as error:
        raise InputError(f"{place}: no such home folder") from error
    return folder if folder.exists() else None
