"""`without_extras.py EXTRAS LINES`: runs command lines of `losslens` where packages of some extras are not installed.

Each line of the JSON list LINES runs in a copy of this process; its exit status and what it prints are told as JSON, a
line each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from losslens.core import extras


class Without:
    """A finder of modules that finds none of some packages."""

    def __init__(self, finder: Any, packages: set[str]) -> None:
        self.finder = finder
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.packages else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def block(*names: str) -> None:
    """Has the packages of these extras not be installed."""
    packages = {module for name in names for module in extras.MODULES[name]}
    sys.meta_path[:] = [Without(finder, packages) for finder in sys.meta_path]


def run(line: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if not child:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            sys.argv = ["losslens", *line]
            from losslens.cli.main import main

            sys.exit(main())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        return status, told.read()


if __name__ == "__main__":
    block(*filter(None, sys.argv[1].split(",")))
    importlib.import_module("losslens.cli.app")  # once for all lines
    for each in json.loads(Path(sys.argv[2]).read_text()):
        print(json.dumps(run(each)), flush=True)
