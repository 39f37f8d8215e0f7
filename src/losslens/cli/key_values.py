"""Command line of the commands without Hydra: `key=value` arguments and flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

from losslens.core.commands import command_name
from losslens.core.extras import format_error, missing_extra
from losslens.core.redaction import guard_streams


class KeyValueParser(argparse.ArgumentParser):
    """Parses `key=value` arguments and flags in any order; reports errors in one line, with exit status 2.

    Args:
        defaults: The keys and their default values.
        settings_help: Help text of the keys.
        **options: As for `ArgumentParser`.
    """

    def __init__(self, defaults: Mapping[str, str], settings_help: str, **options: Any) -> None:
        super().__init__(**options)
        self.defaults = dict(defaults)
        self.add_argument("settings", nargs="*", metavar="key=value", help=settings_help)

    def parse(self, arguments: Sequence[str]) -> tuple[dict[str, str], argparse.Namespace]:
        """Returns the value of every key, and the flags; from here on, printed text is redacted (`redaction`)."""
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
        """Replaces `~` with the home folder."""
        try:
            return str(Path(path).expanduser())
        except RuntimeError:
            self.error(f"{argument}: no such home folder")

    def error(self, message: str) -> NoReturn:
        """Prints an error and exits with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def tells_missing_extras(script: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    """Makes the main function of a command report a missing extra in one line, with status 2.

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
                print(format_error(command_name(script), missing), file=sys.stderr)
                return 2

        return told

    return wrap
