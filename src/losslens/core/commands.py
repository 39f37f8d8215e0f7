"""Formats command lines: as scripts of the checkout (`python train.py`), or as `losslens train`.

Command lines that are printed can be copied: they are valid in the current folder, with the Python that prints them.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_PLAIN = re.compile(r"[A-Za-z0-9_./:%+-]+")
_PROGRAM = "losslens"
# Scripts whose subcommand has another name.
_SUBCOMMANDS = {"wandb_sync": "sync", "wandb_dashboard": "dashboard"}


class _Caller:
    """Records how this process was started."""

    installed = False  # as `losslens`, without a checkout
    subcommand = ""  # empty in a job started by a scheduler


def call_as_installed(subcommand: str = "") -> None:
    """Records that this process, or the command that submitted its job, was started as `losslens <subcommand>`."""
    _Caller.installed, _Caller.subcommand = True, subcommand


def called_subcommand() -> str:
    """Returns the subcommand of `losslens` that started this process; empty for a script."""
    return _Caller.subcommand


def command_name(script: str) -> str:
    """Returns the prefix of a command's messages: `train.py`, or `losslens train`.

    Args:
        script: Path from the project's root: `train.py`, `launch/status.py`.
    """
    return f"{_PROGRAM} {_subcommand(script)}" if _Caller.installed else Path(script).name


def typed_command(script: str) -> str:
    """Returns what the user types: `python train.py`, or `losslens train`."""
    return command_name(script) if _Caller.installed else f"python {script}"


def _subcommand(script: str) -> str:
    return _SUBCOMMANDS.get(Path(script).stem, Path(script).stem)


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
    program = [*_program(), _subcommand(script)] if _Caller.installed else [_python(), _path(script)]
    return shlex.join([*program, *settings, *flags])


def _program() -> list[str]:
    """Returns `losslens` if that belongs to the running interpreter, else its path, or `python -m losslens`."""
    beside = Path(sys.executable or "python").parent / _PROGRAM
    found = shutil.which(_PROGRAM)
    if found and Path(found).parent == beside.parent:
        return [_PROGRAM]
    return [_short(beside)] if beside.is_file() else [_python(), "-m", _PROGRAM]


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
    return _short(executable)


def _short(file: Path) -> str:
    return os.path.relpath(file) if file.is_relative_to(Path.cwd()) else str(file)


def _path(script: str) -> str:
    """Returns the path of a script in the project of the running one, relative in the same way as that one's."""
    running = Path(sys.argv[0])
    root = running.parent.parent if running.parent.name == "launch" else running.parent
    return str(root / script) if (root / script).is_file() else script
