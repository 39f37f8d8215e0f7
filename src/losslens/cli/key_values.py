"""The command line of the scripts in `launch/`: `key=value` as in the others, without Hydra."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from losslens.core.commands import called
from losslens.core.extras import missing_extra, tell
from losslens.core.redaction import guard_streams


class KeyValueParser(argparse.ArgumentParser):
    """Takes `key=value` arguments and flags, in any order; says what is wrong in one line, with exit status 2.

    Args:
        defaults: The keys, and what they are when they are not given.
        settings_help: What `--help` says of the keys.
        **options: As for `ArgumentParser`.
    """

    def __init__(self, defaults: Mapping[str, str], settings_help: str, **options: Any) -> None:
        super().__init__(**options)
        self.defaults = dict(defaults)
        self.add_argument("settings", nargs="*", metavar="key=value", help=settings_help)

    def parse(self, arguments: Sequence[str]) -> tuple[dict[str, str], argparse.Namespace]:
        """The value of every key, and the flags; from here on what is printed is guarded (`redaction`)."""
        guard_streams()
        asked = self.parse_intermixed_args(arguments)
        settings = dict(self.defaults)
        for argument in asked.settings:
            name, _, value = argument.partition("=")
            if name not in settings or not value:
                self.error(f"{argument}: takes {', '.join(f'{key}=…' for key in settings)}")
            settings[name] = self._at_home(argument, value) if name == "output_dir" else value
        return settings, asked

    def _at_home(self, argument: str, path: str) -> str:
        """A folder, `~` replaced by the home folder."""
        try:
            return str(Path(path).expanduser())
        except RuntimeError:
            self.error(f"{argument}: no such home folder")

    def error(self, message: str) -> NoReturn:
        """Ends the script."""
        self.exit(2, f"{self.prog}: {message}\n")


def tells_missing_extras(script: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    """Has the main function of a command end with one line, and status 2, where a package of an extra is missing.

    Args:
        script: Path of its script from the project's root.
    """

    def wrap(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        @wraps(main)
        def told(arguments: list[str]) -> int:
            try:
                return main(arguments)
            except ModuleNotFoundError as error:
                missing = missing_extra(error)
                if missing is None:
                    raise
                print(tell(called(script), missing), file=sys.stderr)
                return 2

        return told

    return wrap
