"""Weights & Biases: one run a run, closed whatever happens, and never a reason for training to stop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from losslens.config import Logger
from losslens.files import digest


@contextmanager
def logged(
    settings: Logger, folder: Path, sweep: str, tags: list[str], config: dict[str, Any]
) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """Opens the W&B run of the run in `folder` and gives the function that takes a step and its numbers.

    Offline by default: the files lie in `<folder>/wandb`, for `wandb sync`. Online, a run that is gone on with keeps
    its id; offline, every segment has an id of its own and the sweep as its group, since segments of one id do not
    append. What goes wrong in W&B is warned of once.
    """
    if settings.name == "none":
        yield lambda step, values: None
        return
    run = _guarded(lambda: _open(settings, folder, sweep, tags, config))
    broken = run is None

    def log(step: int, values: dict[str, float]) -> None:
        nonlocal broken
        if not broken:
            broken = _guarded(lambda: run.log(values, step=step) or True) is None

    exit_code = 1
    try:
        yield log
        exit_code = 0
    finally:
        if run is not None:
            _guarded(lambda: run.finish(exit_code=exit_code) or True)


def _open(settings: Logger, folder: Path, sweep: str, tags: list[str], config: dict[str, Any]) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    online = settings.mode == "online"
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=sweep,
        job_type="train",
        name=folder.name,
        tags=tags,
        config=config,
        dir=folder,
        mode=settings.mode,
        id=digest([sweep, folder.name], 16) if online else None,
        resume="allow" if online else None,
        settings=wandb.Settings(console="off", disable_git=True, save_code=False, disable_code=True),
    )


def _guarded(call: Callable[[], Any]) -> Any:
    """What `call` gives, or None and a warning when it raises."""
    try:
        return call()
    except Exception as error:
        warnings.warn(f"W&B is left out of this run: {error}", stacklevel=2)
        return None
