"""Configuration of logging and of weight tracking during training."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from losslens.config.base import Section, UserPlace

# Names of projects that W&B accepts.
PROJECT = r"^[^/\\#?%:]{1,128}$"


class Logger(Section):
    """Destination of metrics and artifacts, in addition to `metrics.jsonl`."""

    name: Literal["wandb", "none"]
    mode: Literal["offline", "online"]
    project: str = Field(pattern=PROJECT)
    entity: str | None
    artifacts: bool


class WeightTracking(Section):
    """Adapters with which a run's update is compared during training."""

    references: Literal["auto"] | dict[str, UserPlace]
