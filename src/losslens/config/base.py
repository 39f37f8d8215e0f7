"""Names, paths and addresses as a user may write them, and the base of all sections of the configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
)

from losslens.core.redaction import remember_address

_NAME_LENGTH = 100  # of 255 that a file's name may have: names of runs and files hold several


def _of_a_folder(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"a name of letters, digits, ., _ and -, which begins with a letter or digit, not {name!r}")
    if len(name) > _NAME_LENGTH:
        raise ValueError(f"{len(name)} characters; a name has at most {_NAME_LENGTH}")
    return name


FolderName = Annotated[str, AfterValidator(_of_a_folder)]


def expand_home(path: Any) -> Any:
    """A path with `~` replaced by the home folder."""
    if not isinstance(path, (str, Path)):
        return path
    if not str(path).strip():
        raise ValueError("empty; the folder here is .")
    if "\0" in str(path):
        raise ValueError("a path has no null character")
    if not str(path).startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path}: no such home folder") from error


# A file or folder that the user names; and one that may be an id of the hub instead.
UserPath = Annotated[Path, BeforeValidator(expand_home)]

UserPlace = Annotated[str, BeforeValidator(expand_home)]


def _not_reserved(name: str) -> str:
    if name in ("rollouts", "references", "init", "adapters", "cache"):
        raise ValueError(f"{name} is the name of another folder of output_dir")
    return name


SweepName = Annotated[FolderName, AfterValidator(_not_reserved)]


class Section(BaseModel):
    """A part of the configuration: no field that is not declared, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def check_address(url: str | None) -> str | None:
    """Checks that an address names no user, password or query, and keeps its secret parts out of what is printed."""
    parts = urlsplit(url or "http://unset")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("an address without user, password and query; a key comes from the environment")
    remember_address(url)
    return url
