"""Snapshot of the code at submission, so that a job that starts later, or is requeued, runs the same code."""

from __future__ import annotations

import shutil
from pathlib import Path

import losslens
from losslens.core import provenance
from losslens.core.files import atomic_folder, write_json
from losslens.core.hashing import hash_file, hash_json

_SOURCES = ("*.py", "*.css", "*.js", "*.jinja")


def snapshot_code(script: Path, folder: Path) -> Path:
    """Copies the package and the scripts beside the entry script to `<folder>/code-<hash>`, unless it exists.

    Args:
        script: Path of the entry script, such as `train.py`.
        folder: Folder of a sweep's code snapshots.

    Returns:
        The copy, with `src/losslens`, the scripts of the project root, and their commit in `code.json`.
    """
    package = Path(losslens.__file__).parent
    files = {Path(file.name): file for file in script.parent.glob("*.py")}
    for pattern in _SOURCES:
        files |= {Path("src", "losslens") / file.relative_to(package): file for file in package.rglob(pattern)}
    commit = provenance.code_version()
    content = {str(name): hash_file(file) for name, file in sorted(files.items())}
    copy = folder / f"code-{hash_json([content, commit], 12)}"
    if not (copy / provenance.KEPT_CODE).exists():
        with atomic_folder(copy) as temporary:
            for name, file in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, temporary / name)
            write_json(temporary / provenance.KEPT_CODE, commit)
    return copy
