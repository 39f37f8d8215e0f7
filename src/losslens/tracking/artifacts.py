"""W&B artifacts, identified by content: the lineage rollouts → run → adapter → analysis."""

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


def use(session: Session, kind: Kind, name: str, folder: Path) -> None:
    """Logs the files of `folder` as an input artifact of the run, and uploads them unless W&B has them."""

    def log_input(run: Any) -> None:
        artifact = _artifact(kind, name, folder, folder.iterdir(), _copies(run, name))
        # Like `run.use_artifact`, which however fails offline, and online blocks until all files are uploaded.
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    session.run_safely(log_input)


def log(session: Session, kind: Kind, name: str, folder: Path, files: Iterable[Path]) -> None:
    """Logs `files`, which lie below `folder`, as an output artifact of the run, and uploads them."""
    session.run_safely(lambda run: run.log_artifact(_artifact(kind, name, folder, files, _copies(run, name))))


def _copies(run: Any, name: str) -> Path:
    """Folder of redacted copies, among the run's W&B files."""
    return Path(run.settings.sync_dir) / "shareable" / name


def _artifact(kind: Kind, name: str, folder: Path, files: Iterable[Path], copies: Path) -> Any:
    import wandb

    # W&B identifies a version by name and content, whichever run logs it.
    artifact = wandb.Artifact(fit_name(re.sub(r"[^A-Za-z0-9_.-]", "_", f"{kind}-{name}"), LONGEST_NAME), kind)
    for file in sorted(files):
        if file.is_file():
            entry = file.relative_to(folder).as_posix()
            # Immutable: W&B need not copy the file, since it is never written again.
            artifact.add_file(str(_redacted(file, copies / entry).resolve()), name=entry, policy="immutable")
    return artifact


def _redacted(file: Path, copy: Path) -> Path:
    """The file, or, if its text reveals private facts about this machine, a copy without them."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return file
    redacted = redact(_without_host_and_diff(text) if file.name == "manifest.json" else text)
    if redacted == text:
        return file
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(redacted, encoding="utf-8")
    return copy


def _without_host_and_diff(text: str) -> str:
    """A manifest without the host name and the uncommitted changes, which the report leaves out, too."""
    manifest = json.loads(text)
    manifest.pop("content_sha256", None)  # of the content with what is removed here
    removed = [manifest.get("machine", {}).pop("host", None), manifest.get("code", {}).pop("dirty_diff", None)]
    return json.dumps(manifest, indent=2) if any(removed) or redact(text) != text else text
