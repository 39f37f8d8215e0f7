"""What W&B keeps the lineage of: rollouts → run → adapter → analysis, by the content of the files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from losslens.logger.session import Session

Kind = Literal["rollouts", "adapter", "analysis"]


def use(told: Session, kind: Kind, name: str, folder: Path) -> None:
    """Says that the run reads the files of `folder`. Who is the first to say so also uploads them."""

    def say(run: Any) -> None:
        artifact = _artifact(kind, name, folder, folder.iterdir())
        if run.offline:
            # What `run.use_artifact` does with files that W&B may not know yet; by that name it wants to be online.
            run._log_artifact(artifact, use_after_commit=True)
        else:
            run.use_artifact(artifact)

    told.tell(say)


def log(told: Session, kind: Kind, name: str, folder: Path, files: Iterable[Path]) -> None:
    """Says that the run made these `files` below `folder`, and uploads them."""
    told.tell(lambda run: run.log_artifact(_artifact(kind, name, folder, files)))


def _artifact(kind: Kind, name: str, folder: Path, files: Iterable[Path]) -> Any:
    import wandb

    # The same content under the same name is the same version to W&B, whoever brings it.
    title = re.sub(r"[^\w.-]", "_", f"{kind}-{name}")[:128]
    artifact = wandb.Artifact(title, kind)
    for file in sorted(files):
        if file.is_file():
            # Immutable: not copied, since it is never written again.
            artifact.add_file(str(file.absolute()), name=file.relative_to(folder).as_posix(), policy="immutable")
    return artifact
