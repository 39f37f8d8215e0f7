"""The rooms know only what they may, and the drawing shows all of them."""

from __future__ import annotations

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
