"""The rooms know only what they may, and the drawing shows all of them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

import losslens

pytestmark = pytest.mark.fast

PACKAGE = Path(losslens.__file__).parent
ROOT = PACKAGE.parents[1]


def test_rooms_import_as_pyproject_says() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == EXIT_STATUS_SUCCESS


def test_every_room_is_in_the_drawing() -> None:
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert not {room for room in rooms if f"`{room}/`" not in drawing}


def test_no_docstring_is_a_question() -> None:
    """A docstring begins with a verb or a noun of the field."""
    riddle = re.compile(r"(What|Whether|Of|Where|Which|How|Who|Whose|Those|Inside|Why|As)\b")
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                if riddle.match(text):
                    found.append(f"{file.name}: {text.splitlines()[0]}")
    assert not found
