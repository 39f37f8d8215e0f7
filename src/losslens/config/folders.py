"""Locates the configuration: `conf/`, and the user's own folder (`--config-dir`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from losslens.core.errors import InputError

_FLAGS = ("--config-dir", "-cd")


def conf_folder() -> Path:
    """Returns `conf/`: inside an installed package, or at the top of a checkout.

    Raises:
        InputError: It exists in neither place.
    """
    package = Path(str(files("losslens")))
    places = (package / "conf", package.parents[1] / "conf")
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise InputError(f"{places[0]}: no such folder; reinstall losslens, or work in its checkout")


class ConfigFolders:
    """`conf/` and the folders added on the command line; the first that has a file takes precedence.

    Args:
        conf: The folder `conf/`.
        arguments: The command line without the script.

    Raises:
        InputError: An added folder does not exist.
    """

    def __init__(self, conf: Path, arguments: Sequence[str] = ()) -> None:
        self.conf = conf
        added = [Path(folder) for folder in _added(arguments)]
        for folder in added:
            if not folder.is_dir():
                raise InputError(f"--config-dir {folder}: no such folder")
        self._folders = [conf, *added]

    def is_group(self, group: str) -> bool:
        """Returns True if this is a config group, such as `method`."""
        return any((folder / group).is_dir() for folder in self._folders)

    def files(self, group: str) -> dict[str, Path]:
        """Returns the file of each option of a group, by name, sorted."""
        found = {file.stem: file for folder in reversed(self._folders) for file in (folder / group).glob("*.yaml")}
        return dict(sorted(found.items()))

    def options(self, group: str) -> list[str]:
        """Returns the names of a group's options, sorted."""
        return list(self.files(group))


def _added(arguments: Sequence[str]) -> list[str]:
    """Returns the folders added on the command line; as in Hydra, only the last one counts."""
    found = []
    for place, argument in enumerate(arguments):
        flag, separator, value = argument.partition("=")
        if flag in _FLAGS:
            found = [value] if separator else list(arguments[place + 1 : place + 2])
    return found
