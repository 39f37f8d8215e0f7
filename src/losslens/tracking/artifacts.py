"""What W&B keeps the lineage of: rollouts → run → adapter → analysis, by the content of the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from losslens.core.redaction import redact
from losslens.tracking.identity import LONGEST_NAME, fit_name
from losslens.tracking.session import Session

Kind = Literal["rollouts", "adapter", "analysis"]


def use(told: Session, kind: Kind, name: str, folder: Path) -> None:
    """Says that the run reads the files of `folder`. Who is the first to say so also uploads them."""

    def say(run: Any) -> None:
        artifact = _artifact(kind, name, folder, folder.iterdir(), _aside(run, name))
        # What `run.use_artifact` does with files that W&B may not know yet. By that name it wants to be online, and
        # waits until the server has them all, however long that takes.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    told.tell(say)


def log(told: Session, kind: Kind, name: str, folder: Path, files: Iterable[Path]) -> None:
    """Says that the run made these `files` below `folder`, and uploads them."""
    told.tell(lambda run: run.log_artifact(_artifact(kind, name, folder, files, _aside(run, name))))


def _aside(run: Any, name: str) -> Path:
    """Where copies lie that are made for sending alone: with the run's W&B files."""
    return Path(run.settings.sync_dir) / "shareable" / name


def _artifact(kind: Kind, name: str, folder: Path, files: Iterable[Path], aside: Path) -> Any:
    import wandb

    # The same content under the same name is the same version to W&B, whoever brings it.
    artifact = wandb.Artifact(fit_name(re.sub(r"[^A-Za-z0-9_.-]", "_", f"{kind}-{name}"), LONGEST_NAME), kind)
    for file in sorted(files):
        if file.is_file():
            inside = file.relative_to(folder).as_posix()
            # Immutable: not copied, since it is never written again.
            artifact.add_file(str(_shareable(file, aside / inside).resolve()), name=inside, policy="immutable")
    return artifact


def _shareable(file: Path, copy: Path) -> Path:
    """The file, or where it is a text that tells more of this machine than may leave it a copy that does not."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return file
    told = redact(_without_host_and_diff(text) if file.name == "manifest.json" else text)
    if told == text:
        return file
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(told, encoding="utf-8")
    return copy


def _without_host_and_diff(text: str) -> str:
    """A manifest without what the report of an analysis leaves out, too."""
    manifest = json.loads(text)
    found = [manifest.get("machine", {}).pop("host", None), manifest.get("code", {}).pop("dirty_diff", None)]
    return json.dumps(manifest, indent=2) if any(found) else text
