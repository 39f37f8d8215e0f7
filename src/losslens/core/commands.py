"""Command lines for the user to copy: valid in the current folder, with the Python interpreter that prints them."""

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
    """Formats the command line of another entry script for the same sweep.

    Args:
        script: Path from the project's root: `analyze.py`, `launch/status.py`.
        sweep: Name of the sweep, or of several; None omits the option.
        output_dir: Output folder; omitted if it is the default.
        flags: Further arguments.
    """
    hydra = "/" not in script  # the scripts in `launch/` take values literally
    values = {"sweep": sweep, "output_dir": None if str(output_dir) == "outputs" else str(output_dir)}
    settings = [f"{name}={_value(value, hydra)}" for name, value in values.items() if value is not None]
    return shlex.join([_python(), _path(script), *settings, *flags])


def _value(value: str | Sequence[str], hydra: bool) -> str:
    if not isinstance(value, str):
        return f"[{','.join(value)}]"
    if not hydra or _PLAIN.fullmatch(value):
        return value
    if not re.search(r'["$\\]', value):
        return f'"{value}"'  # `shlex.join` puts single quotes around it
    # In Hydra's grammar a backslash escapes only in front of a quote.
    text = re.sub(r"(\\*)'", r"\1\1\\'", value)
    text = re.sub(r"(\\+)$", r"\1\1", text)
    return f"'{text}'"


def _python() -> str:
    """Returns `python` if that is the running interpreter, else its path, relative if it is in the current folder."""
    executable = Path(sys.executable or "python")
    on_path = shutil.which("python")
    if not sys.executable or (on_path and Path(on_path).parent == executable.parent):
        return "python"
    return os.path.relpath(executable) if executable.is_relative_to(Path.cwd()) else str(executable)


def _path(script: str) -> str:
    """Returns the path of a script in the project of the running one, relative in the same way as that one's."""
    running = Path(sys.argv[0])
    root = running.parent.parent if running.parent.name == "launch" else running.parent
    return str(root / script) if (root / script).is_file() else script
