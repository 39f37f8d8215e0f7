"""The catalogue of wrong inputs: each is refused in one line with status 2, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from tests.conftest import Started, environment
from tests.faults.bad_input import CATALOGUE, BadInput
from tests.faults.ledger import Outcome, record

_BAR = re.compile(r"\d+%\|.*\| \d+/\d+ \[")  # a progress bar that was cleared before the line
_SECONDS = 60  # the slowest takes a few


def snapshot(folder: Path) -> dict[str, str]:
    """Everything below a folder: the target of a link, the hash of a file's content."""

    def content(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def came_through(wrong: BadInput, folder: Path) -> tuple[Outcome, str]:
    if wrong.files:
        wrong.files(folder)
    before = snapshot(folder)
    with Started(["-m", "losslens", *wrong.arguments], environment(), folder) as process:
        try:
            status = process.wait(timeout=_SECONDS)
        except AssertionError as error:
            return "hang", str(error)
        said = process.stderr
    detail = f"losslens {wrong.line}\nstatus {status}\n{said}"
    if "Traceback" in said:
        return "traceback", detail
    if status != 2:
        return "wrong status", detail
    if (after := snapshot(folder)) != before:
        return "left over", f"{detail}\n{sorted(after.items() ^ before.items())}"
    lines = [line for line in said.splitlines() if line.strip() and not _BAR.search(line)]
    clear = len(lines) == 1 and wrong.names in lines[0] and wrong.says in lines[0]
    return ("clear line" if clear else "different result"), detail


@pytest.mark.parametrize("command", CATALOGUE)
def test_wrong_input_is_refused_in_one_line(command: str, tmp_path: Path) -> None:
    failed = []
    for number, wrong in enumerate(CATALOGUE[command]):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome, detail = came_through(wrong, folder)
        try:
            record("bad input", wrong.shown, outcome, detail)
        except AssertionError as error:  # all of them, so that one run shows what there is to mend
            failed.append(str(error))
    assert not failed, "\n\n".join(failed)


def test_the_catalogue_is_large_and_has_every_command() -> None:
    inputs = [wrong for group in CATALOGUE.values() for wrong in group]
    assert len(inputs) >= 80
    assert len({(wrong.line, wrong.needs) for wrong in inputs}) == len(inputs)
    commands = {"train", "rollout", "evaluate", "analyze", "compare", "status", "sync", "dashboard", "migrate", "slurm"}
    assert commands <= {wrong.line.split()[0] for wrong in inputs}
