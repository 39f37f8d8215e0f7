"""What is logged, and where it goes."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from losslens.config.base import Section, UserPlace


class Logger(Section):
    """What is logged, and where it goes besides `metrics.jsonl`."""

    name: Literal["wandb", "none"]
    mode: Literal["offline", "online"]
    project: str = Field(pattern=r"^[^/\\#?%:]{1,128}$")  # W&B's own rule
    entity: str | None
    artifacts: bool


class WeightTracking(Section):
    """What the growing update is compared with while it trains."""

    references: Literal["auto"] | dict[str, UserPlace]
