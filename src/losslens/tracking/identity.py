"""Identity of runs on W&B, independent of W&B's environment variables and settings files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from losslens.core.hashing import hash_json

# W&B rejects longer tags, and its server longer names and groups.
LONGEST_TAG = 64
LONGEST_NAME = 128

# Prefixes of W&B settings that affect the identity of a run, its group, or what it resumes.
_IDENTITY = (
    "run_",
    "resume",
    "fork_from",
    "sweep_",
    "launch",
    "job_",
    "project",
    "mode",
    "x_label",
    "config_paths",
)
# Environment variables whose name differs from that of the setting.
_OTHER_NAMES = {"name": "run_name", "notes": "run_notes", "tags": "run_tags", "config": "config_paths"}


def fit_name(text: str, longest: int) -> str:
    """Truncates a text that is too long and appends a hash of the whole, so that different texts stay different."""
    return text if len(text) <= longest else f"{text[: longest - 9]}-{hash_json(text, 8)}"


@contextmanager
def without_environment() -> Iterator[None]:
    """Context in which `WANDB_*` variables and W&B's settings files do not affect the identity of a run.

    They still determine server, login and local folders.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _affects_identity(name)}
    try:
        import wandb

        settings = wandb.setup().settings
        fields = type(settings).model_fields
        previous = {name: getattr(settings, name) for name in fields if name.startswith(_IDENTITY)}
        for name in previous:
            setattr(settings, name, fields[name].get_default(call_default_factory=True))
        try:
            yield
        finally:
            for name, value in previous.items():
                setattr(settings, name, value)
    finally:
        os.environ.update(hidden)


def _affects_identity(variable: str) -> bool:
    if not variable.startswith("WANDB_"):
        return False
    name = variable.removeprefix("WANDB_").lower()
    setting = f"x{name}" if name.startswith("_") else _OTHER_NAMES.get(name, name)
    return setting.startswith(_IDENTITY)
