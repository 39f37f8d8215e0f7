"""Snapshot of the code at submission, so that a job that starts later, or is requeued, runs the same code."""

from __future__ import annotations

import shutil
from pathlib import Path

import losslens
from losslens.core import provenance
from losslens.core.errors import InputError, first_line
from losslens.core.files import atomic_folder, read_json, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.core.redaction import remove_secrets

# Where the package lies in a copy.
_PACKAGE = Path("src", "losslens")
# The weights of the embedded models, which a job reads where its configuration says.
_WEIGHTS = ".safetensors"


def snapshot_code(script: Path, folder: Path) -> Path:
    """Copies the package, and the user's files that jobs may import, to `<folder>/code-<hash>`, unless it is there.

    Those are the Python files beside the entry script; for `losslens`, which lies in the package, those of the current
    folder.

    Args:
        script: Path of the entry script, such as `train.py`.
        folder: Folder of a sweep's code snapshots.

    Returns:
        The copy, with `src/losslens`, the user's files, and the commit of the package in `code.json`.
    """
    package = Path(losslens.__file__).parent
    own = Path.cwd() if is_in_package(script) else script.parent
    files = {Path(file.name): file for file in own.glob("*.py") if file.is_file()}
    files |= {_PACKAGE / file.relative_to(package): file for file in package.rglob("*") if file.is_file()}
    files = {name: file for name, file in files.items() if _is_code(name)}
    commit = remove_secrets(provenance.code_version())  # as it will be read again
    copy = folder / _name({name: hash_file(file) for name, file in files.items()}, commit)
    if damage_of(copy):
        with atomic_folder(copy) as temporary:
            for name, file in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / name)
            write_json(temporary / provenance.CODE_FILE, commit)
    return copy


def damage_of(copy: Path) -> str:
    """Says in one line why a code snapshot is not the one after which it is named; empty if it is."""
    try:
        found = {file.relative_to(copy): file for file in copy.rglob("*") if file.is_file()}
        content = {name: hash_file(file) for name, file in found.items() if _is_code(name)}
        if _name(content, read_json(copy / provenance.CODE_FILE)) == copy.name:
            return ""
    except (InputError, OSError) as error:
        return f"{copy}: the code of this job is damaged ({first_line(error)}); submit it again"
    return f"{copy}: the code of this job has changed since it was submitted; submit it again"


def _is_code(name: Path) -> bool:
    """Returns True for files that jobs may import or read: those of the package, and Python files beside it.

    What jobs and systems leave beside the code is none: compiled files, caches, hidden files.
    """
    if "__pycache__" in name.parts or any(part.startswith(".") for part in name.parts) or name.suffix == _WEIGHTS:
        return False
    return name.is_relative_to(_PACKAGE) or name.suffix == ".py"


def _name(content: dict[Path, str], commit: object) -> str:
    return f"code-{hash_json([{file.as_posix(): sha256 for file, sha256 in content.items()}, commit], 12)}"


def script_in(copy: Path, script: Path) -> Path:
    """Returns the path of the entry script in a code snapshot."""
    package = Path(losslens.__file__).resolve().parent
    return copy / "src" / "losslens" / script.relative_to(package) if is_in_package(script) else copy / script.name


def is_in_package(script: Path) -> bool:
    """Returns True if an entry script belongs to the package rather than to a checkout."""
    return script.resolve().is_relative_to(Path(losslens.__file__).resolve().parent)
