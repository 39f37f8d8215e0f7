"""The code as it is when a job is submitted: a job that starts late, or again, runs that and not what came after."""

from __future__ import annotations

import shutil
from pathlib import Path

import losslens
from losslens.core import provenance
from losslens.core.files import atomic_folder, write_json
from losslens.core.hashing import hash_file, hash_json

_SOURCES = ("*.py", "*.css", "*.js", "*.jinja")


def snapshot_code(script: Path, folder: Path) -> Path:
    """Copies the package, and what lies beside the entry script, to `<folder>/code-<hash>`, unless that is there.

    Args:
        script: Path of the entry script, say `train.py`.
        folder: Where the copies of a sweep lie.

    Returns:
        The copy: `src/losslens` and the scripts of the project's root in it, and in `code.json` the commit they are of.
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
