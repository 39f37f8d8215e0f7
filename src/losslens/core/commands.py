"""Command lines to print: they work as they stand, from the folder and with the Python of the one that prints them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_PLAIN = re.compile(r"[A-Za-z0-9_./:%+-]+")


def format_command(script: str, sweep: str | Sequence[str] | None, output_dir: Path | str, *flags: str) -> str:
    """The command line of another of the project's scripts on the same sweep.

    Args:
        script: Its path from the project's root: `analyze.py`, `launch/status.py`.
        sweep: The sweep, or several.
        output_dir: Where it lies; named unless it is the default.
        flags: What else belongs to it.
    """
    hydra = "/" not in script  # the scripts in `launch/` take a value as it is
    values = {"sweep": sweep, "output_dir": None if str(output_dir) == "outputs" else str(output_dir)}
    settings = [f"{name}={_value(value, hydra)}" for name, value in values.items() if value is not None]
    return shlex.join([_python(), _path(script), *settings, *flags])


def _value(value: str | Sequence[str], hydra: bool) -> str:
    if not isinstance(value, str):
        return f"[{','.join(value)}]"
    if not hydra or _PLAIN.fullmatch(value):
        return value
    if not re.search(r'["$\\]', value):
        return f'"{value}"'  # the shell's quotes around it are the single ones
    # As Hydra reads it: a backslash counts before a quote only.
    text = re.sub(r"(\\*)'", r"\1\1\\'", value)
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"'{text}'"


def _python() -> str:
    """`python` where that is the one that runs; else its path, short where it lies below this folder."""
    here = Path(sys.executable or "python")
    found = shutil.which("python")
    if not sys.executable or (found and Path(found).parent == here.parent):
        return "python"
    return os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here)


def _path(script: str) -> str:
    """The script beside the one that runs, as that one was called."""
    running = Path(sys.argv[0])
    root = running.parent.parent if running.parent.name == "launch" else running.parent
    return str(root / script) if (root / script).is_file() else script
