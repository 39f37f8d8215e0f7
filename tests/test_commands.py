"""Printed commands can be copied: the shell splits them, and Hydra or the scripts in launch/ read them correctly."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from losslens.cli.key_values import KeyValueParser
from losslens.config.analysis import AnalyzeConfig
from losslens.config.parse import parse
from losslens.core.commands import format_command
from losslens.core.errors import InputError
from tests.conftest import ROOT

pytestmark = pytest.mark.fast

PLACES = (
    "outputs", "/scratch/o", "my runs", "a=b", "(x) [y], {z}", "it's", 'say "x"', "back\\slash", "end\\", "e\\'s",
    "me~", "a,b", "$HOME", "#1", "é",
)  # fmt: skip


@pytest.mark.parametrize(("place", "sweep"), [*((place, "main") for place in PLACES), ("o", ["a", "b.c"]), ("o", None)])
def test_hydra_parses_printed_commands(place: str, sweep: str | list[str] | None) -> None:
    _, script, *overrides = shlex.split(format_command("analyze.py", sweep, place))
    assert script == "analyze.py"
    assert len(overrides) == (sweep is not None) + (place != "outputs")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        found = parse(AnalyzeConfig, compose("analyze", overrides))
    assert found.output_dir == Path(place)
    assert found.sweep == (sweep or "main")


def test_one_rotated_copy_has_no_spread() -> None:
    with (
        initialize_config_dir(str(ROOT / "conf"), version_base="1.3"),
        pytest.raises(InputError, match=r"spectrum_copies=1: a spread needs at least 2"),
    ):
        parse(AnalyzeConfig, compose("analyze", ["spectrum_copies=1"]))


def test_a_folder_with_spaces_is_readable() -> None:
    line = format_command("analyze.py", "main", "/tmp/x (5=b)")
    assert line.endswith("""'output_dir="/tmp/x (5=b)"'""")


@pytest.mark.parametrize("place", PLACES)
def test_launch_scripts_parse_printed_commands(place: str) -> None:
    line = shlex.split(format_command("launch/status.py", "main", place, "--watch"))
    assert line[-1] == "--watch"
    parser = KeyValueParser({"sweep": "", "output_dir": "outputs"}, "")
    parser.add_argument("--watch", action="store_true")
    assert parser.parse(line[2:])[0] == {"sweep": "main", "output_dir": place}


def test_commands_printed_in_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command names the sibling script, and the interpreter if `python` is a different one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py")])
    monkeypatch.setenv("PATH", str(tmp_path))
    python, script, *_ = shlex.split(format_command("analyze.py", "main", "outputs"))
    assert (python, script) == (sys.executable, str(ROOT / "analyze.py"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert format_command("launch/status.py", "main", "o") == f"python {ROOT}/launch/status.py sweep=main output_dir=o"
    monkeypatch.setattr(sys, "argv", [str(ROOT / "launch" / "status.py")])
    assert shlex.split(format_command("analyze.py", "main", "o"))[1] == str(ROOT / "analyze.py")
