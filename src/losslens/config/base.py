"""Types of names, paths and addresses in the configuration, and the base class of its sections."""

from __future__ import annotations

import os
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

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME_LENGTH = 100  # of the 255 characters of a file name, since names of runs and files contain several


def check_name(name: str) -> str:
    """Checks a name that becomes part of file names and tables.

    Raises:
        ValueError: It has other characters than letters, digits, `.`, `_` and `-`, or is too long.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{name!r} must start with a letter or digit and contain only letters, digits, ., _ and -")
    if len(name) > _NAME_LENGTH:
        raise ValueError(f"a name may have at most {_NAME_LENGTH} characters, not {len(name)}")
    return name


# Bytes of a name on Linux and macOS; of a path, less what LossLens adds to it.
_LONGEST_NAME, _LONGEST_PATH = 255, 3000

FolderName = Annotated[str, AfterValidator(check_name)]


def expand_home(path: Any) -> Any:
    """Replaces a leading `~` by the home folder.

    Raises:
        ValueError: The path is empty, too long for a file system, contains a control character, or names an unknown
            home folder.
    """
    if not isinstance(path, (str, Path)):
        return path
    if not str(path).strip():
        raise ValueError("empty path; the current folder is .")
    encoded = os.fsencode(path)
    if len(encoded) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in encoded.split(b"/")):
        raise ValueError(f"a path may have at most {_LONGEST_PATH} bytes, and {_LONGEST_NAME} in each part")
    # A line break would end a directive of a Slurm script, and what follows it would be run.
    if control := _CONTROL.search(str(path)):
        raise ValueError(f"{str(path)!r}: a path must not contain a control character ({control[0]!r})")
    if not str(path).startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path}: no such home folder") from error


# A file or folder given by the user.
UserPath = Annotated[Path, BeforeValidator(expand_home)]

# A folder or hub id given by the user.
UserPlace = Annotated[str, BeforeValidator(expand_home)]


def _not_reserved(name: str) -> str:
    if name in ("rollouts", "references", "init", "adapters", "cache"):
        raise ValueError(f"{name} is a reserved folder of output_dir")
    return name


SweepName = Annotated[FolderName, AfterValidator(_not_reserved)]


class Section(BaseModel):
    """A section of the configuration; rejects undeclared fields and values of other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def check_address(url: str | None) -> str | None:
    """Checks the address of a server, and registers its secret parts for redaction.

    Raises:
        ValueError: It is not an http(s) address, or contains a user, a password or a query.
    """
    parts = urlsplit(url or "http://unset")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address like http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ValueError("must not contain a user, password or query; set the key in the environment")
    remember_address(url)
    return url
