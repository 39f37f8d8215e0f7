"""The rooms of `docs/design.md` know only what they may."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import losslens

PACKAGE = Path(losslens.__file__).parent

# room: what it must not import at the top of a file (tests/test_cli.py covers what is imported later)
FORBIDDEN = {
    "config.py": ("torch", "transformers", "losslens.runs", "losslens.training"),
    "problems": ("torch", "losslens.models", "losslens.runs", "losslens.rollouts"),
    "processes.py": ("transformers", "losslens.runs", "losslens.training", "losslens.config", "losslens.job"),
    "models.py": ("losslens.losses", "losslens.runs", "losslens.training", "losslens.adapters"),
    "adapters.py": ("losslens.losses", "losslens.runs", "losslens.training"),
    "hub.py": ("torch", "transformers", "losslens.models", "losslens.problems", "losslens.config"),
    "packaged.py": ("losslens.models", "losslens.runs", "losslens.config"),
    "completions.py": ("torch", "losslens.generation", "losslens.server", "losslens.config"),
    "server.py": ("torch", "transformers", "losslens.problems", "losslens.runs", "losslens.models"),
    "generation.py": ("losslens.problems", "losslens.runs", "losslens.config"),
    "rollouts": ("losslens.losses", "losslens.training", "losslens.runs"),
    "losses": ("trl", "transformers", "losslens.files", "losslens.config", "losslens.runs"),
    "training": ("losslens.analysis", "losslens.logger", "losslens.job", "losslens.runs", "hydra"),
    "references.py": ("torch", "losslens.training", "losslens.analysis"),
    "identity.py": ("losslens",),
    "spec.py": ("torch", "trl", "losslens.training", "losslens.logger"),
    "runs.py": ("torch", "trl", "losslens.training", "losslens.losses", "losslens.rollouts"),
    "evaluation.py": ("losslens.training", "losslens.runs"),
    "answering.py": ("losslens.training", "losslens.runs", "losslens.scoring"),
    "scoring.py": ("losslens.training",),
    "geometry": ("losslens.config", "losslens.runs", "trl", "losslens.training"),
    "measures": ("torch", "losslens.geometry", "losslens.analysis", "losslens.report", "losslens.config"),
    "updates": ("losslens.geometry", "losslens.models", "losslens.config", "losslens.runs", "trl", "losslens.training"),
    "statistics.py": ("losslens",),
    "analysis": ("losslens.training", "losslens.losses", "wandb", "matplotlib"),
    "report": ("torch", "transformers", "losslens.analysis", "losslens.geometry", "losslens.training", "losslens.runs"),
    "preemption.py": ("torch", "losslens"),
    "slurm": ("torch", "transformers", "trl", "losslens.training", "losslens.analysis", "losslens.report"),
    "logger": ("losslens.training", "losslens.geometry", "losslens.analysis"),
}


def imports(file: Path) -> set[str]:
    """Every module that `file` imports outside `if TYPE_CHECKING`, wherever in it."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    guarded = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in set(ast.walk(tree)) - guarded:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_knows_only_what_it_may(room: str) -> None:
    path = PACKAGE / room
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    assert files
    for file in files:
        for name in imports(file):
            for forbidden in FORBIDDEN[room]:
                assert name != forbidden, f"{file.name} imports {name}"
                assert not name.startswith(f"{forbidden}."), f"{file.name} imports {name}"


def test_every_room_is_in_the_drawing() -> None:
    drawing = (PACKAGE.parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
    rooms = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists() or p.suffix == ".py"}
    missing = {
        room for room in rooms - {"__init__.py", "errors.py", "files.py", "provenance.py"} if room not in drawing
    }
    assert not missing
