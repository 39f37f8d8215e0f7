"""Folders of a run that are symbolic links: a user's to another disk, or a stranger's to anywhere."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from losslens.core.errors import InputError

# Folders of a run in which files are replaced or deleted. `adapter` and `model` are replaced whole, link or not.
_WRITTEN = ("checkpoints", "snapshots", "eval")
# File in the target of a link, with the name of the run that may write there.
OWNER = ".losslens-run"


def require_own_links(run: Path) -> None:
    """Checks that the linked folders of a run lead to folders of its own, so that nothing else is lost through them.

    An empty folder becomes the run's own: its name is written into it.

    Args:
        run: Folder of the run, or of a snapshot, whose run's links are checked as well.

    Raises:
        InputError: A link leads nowhere, or to a folder with files that are not known to be of this run.
    """
    if run.parent.name == "snapshots":
        require_own_links(run.parents[1])
    for folder in (run / name for name in _WRITTEN if (run / name).is_symlink()):
        if not folder.is_dir():
            raise InputError(f"{folder}: a link that leads to no folder; make that folder, or remove the link")
        owner = folder / OWNER
        if not owner.exists() and not any(_is_of_somebody(entry) for entry in folder.iterdir()):
            with suppress(FileExistsError), owner.open("x", encoding="utf-8") as file:  # not through another link
                file.write(f"{run.name}\n")
        if not owner.is_file() or owner.read_text(encoding="utf-8", errors="replace").strip() != run.name:
            raise InputError(
                f"{folder}: a link to {folder.resolve()}, whose files may be another's; remove the link, empty that "
                f"folder, or, if they are of this run, write {run.name} into {OWNER} in it"
            )


def _is_of_somebody(entry: Path) -> bool:
    """Returns False for what file systems make by themselves: the root of a disk has `lost+found`, NFS `.nfs…`."""
    return entry.name != "lost+found" and not entry.name.startswith(".nfs")
