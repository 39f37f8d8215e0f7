"""Where the configuration lies: `conf/`, and a folder of one's own beside it (`--config-dir`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from losslens.core.errors import InputError

_FLAGS = ("--config-dir", "-cd")


def conf_folder() -> Path:
    """`conf/`: in an installed package beside its modules, in a checkout at the top.

    Raises:
        InputError: There is none: neither installed nor a checkout.
    """
    package = Path(str(files("losslens")))
    places = (package / "conf", package.parents[1] / "conf")
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    raise InputError(f"{places[0]}: no such folder; install losslens anew, or work in its checkout")


class ConfigFolders:
    """`conf/` and the folders that a command line adds to it, the first that has a file counting.

    Args:
        conf: The folder `conf/`.
        arguments: The command line without the script.

    Raises:
        InputError: There is no folder of that name to add.
    """

    def __init__(self, conf: Path, arguments: Sequence[str] = ()) -> None:
        self.conf = conf
        added = [Path(folder) for folder in _added(arguments)]
        for folder in added:
            if not folder.is_dir():
                raise InputError(f"--config-dir {folder}: no such folder")
        self._folders = [conf, *added]

    def is_group(self, group: str) -> bool:
        """Whether options of this name can be chosen: `method`."""
        return any((folder / group).is_dir() for folder in self._folders)

    def files(self, group: str) -> dict[str, Path]:
        """The file of each option of a group, by the option's name, sorted."""
        found = {file.stem: file for folder in reversed(self._folders) for file in (folder / group).glob("*.yaml")}
        return dict(sorted(found.items()))

    def options(self, group: str) -> list[str]:
        """Names of the options of a group, sorted."""
        return list(self.files(group))


def _added(arguments: Sequence[str]) -> list[str]:
    """The folders that a command line adds, in Hydra's order: of several the last counts alone."""
    found = []
    for place, argument in enumerate(arguments):
        flag, separator, value = argument.partition("=")
        if flag in _FLAGS:
            found = [value] if separator else list(arguments[place + 1 : place + 2])
    return found
