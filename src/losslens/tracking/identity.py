"""Who a run is on W&B: what LossLens says, whatever W&B finds in its environment or its settings files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from losslens.core.hashing import hash_json

# W&B refuses tags that are longer, its server longer names and groups.
LONGEST_TAG = 64
LONGEST_NAME = 128

# Beginnings of the settings of W&B that say which run this is, part of what, and whether it goes on from another one.
_DECIDED = ("run_", "resume", "fork_from", "sweep_", "launch", "job_", "project", "mode", "x_label", "config_paths")
# What W&B reads under another name than that of the setting.
_OTHER_NAMES = {"name": "run_name", "notes": "run_notes", "tags": "run_tags", "config": "config_paths"}


def fit_name(text: str, longest: int) -> str:
    """`text`, or of a longer one its beginning and a hash of the whole, so that two texts stay two."""
    return text if len(text) <= longest else f"{text[: longest - 9]}-{hash_json(text, 8)}"


@contextmanager
def without_environment() -> Iterator[None]:
    """Inside, neither `WANDB_*` variables nor W&B's settings files say who a run is.

    Where W&B is reached, as whom, and where it keeps its files, they still say.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _decides(name)}
    try:
        import wandb

        settings = wandb.setup().settings
        fields = type(settings).model_fields
        before = {name: getattr(settings, name) for name in fields if name.startswith(_DECIDED)}
        for name in before:
            setattr(settings, name, fields[name].get_default(call_default_factory=True))
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(settings, name, value)
    finally:
        os.environ.update(hidden)


def _decides(variable: str) -> bool:
    if not variable.startswith("WANDB_"):
        return False
    name = variable.removeprefix("WANDB_").lower()
    setting = f"x{name}" if name.startswith("_") else _OTHER_NAMES.get(name, name)
    return setting.startswith(_DECIDED)
