"""Prints the section of CHANGELOG.md about a release: `python tools/release_notes.py v1.2.3`.

It ends with 2 where the tag is not what the package, CITATION.cff and CHANGELOG.md say. No package is needed for it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(changelog: str, version: str) -> str:
    """The section of a version, without its heading.

    Raises:
        ValueError: There is none, or it does not say which identities it changed.
    """
    found = re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None:
        raise ValueError(f"CHANGELOG.md: no section `## [{version}] - YEAR-MONTH-DAY`")
    section = found[1].strip()
    if not re.search(r"^\*\*Identities changed:\*\* \S", section, re.M):
        raise ValueError(f"CHANGELOG.md: {version} has no line **Identities changed:**")
    return section


def versions(root: Path) -> dict[str, str]:
    """The version of the code wherever it is written, by file."""
    places = {"src/losslens/__init__.py": r'^__version__ = "(.+)"$', "CITATION.cff": r"^version: (\S+)$"}
    found = {}
    for file, line in places.items():
        match = re.search(line, (root / file).read_text(encoding="utf-8"), re.M)
        found[file] = match[1] if match else "none"
    return found


def main(arguments: list[str]) -> int:
    """Prints the notes and gives the exit status."""
    if len(arguments) != 1 or not arguments[0].startswith("v"):
        print("release_notes.py: give one tag, for example v1.2.3", file=sys.stderr)
        return 2
    version = arguments[0].removeprefix("v")
    for file, written in versions(ROOT).items():
        if written != version:
            print(f"release_notes.py: {arguments[0]}: {file} has version {written}", file=sys.stderr)
            return 2
    try:
        print(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version))
    except ValueError as error:
        print(f"release_notes.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
