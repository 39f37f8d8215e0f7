"""Configuration of learning rate, adapter and optimiser, and of `train.py`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    model_validator,
)

from losslens.config.base import FolderName, Section, SweepName
from losslens.config.data import Benchmarks, Data, RolloutConfig
from losslens.config.evaluation import Evaluation
from losslens.config.identity import Formerly
from losslens.config.tracking import Logger, WeightTracking
from losslens.core.errors import InputError

# Rollouts that a loss may train on: losslens.training.batches.
TrainOn = Literal["all", "mixed_groups", "paired_rollouts"]
# Most rows that a run may train on, counted once for each time: their order is laid out in advance.
_MOST_ROWS = 10**9
# Its name in identities and earlier manifests.
TRAIN_ON = Formerly("train_on", {"paired_rollouts": "dpo_rows"})


class LearningRate(Section):
    """The peak learning rate: `peak` times `factor` or, if that is None, times the loss's conventional scale."""

    name: FolderName
    peak: Annotated[float, Formerly("base")] = Field(gt=0, allow_inf_nan=False)
    factor: float | None = Field(gt=0, allow_inf_nan=False)

    def of(self, conventional_scale: float) -> float:
        """Computes the peak learning rate of a loss from its `conventional_lr_scale`."""
        rate = self.peak * (conventional_scale if self.factor is None else self.factor)
        return float(f"{rate:.12g}")  # so that a tenth of 1e-3 equals 1e-4


class LoraRank(Section):
    """Rank, alpha and dropout of the adapter."""

    r: int = Field(ge=1)
    alpha: float | None = Field(gt=0, allow_inf_nan=False)
    dropout: float = Field(ge=0, lt=1)

    @property
    def scale_numerator(self) -> float:
        """LoRA's alpha: twice the rank unless it is set."""
        return 2.0 * self.r if self.alpha is None else self.alpha


class Optim(Section):
    """The optimiser and its schedule.

    New options must have a default in this class, so that earlier runs keep their identity.
    """

    max_steps: int = Field(ge=1, le=_MOST_ROWS)
    epochs: float | None = Field(gt=0, le=_MOST_ROWS)
    batch_size: int = Field(ge=1, le=_MOST_ROWS)
    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)]
    scheduler: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ]
    warmup_ratio: Annotated[float, Formerly("warmup")] = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(gt=0, allow_inf_nan=False)
    gradient_checkpointing: Literal["auto"] | bool
    log_steps: int = Field(ge=1)
    save_steps: int = Field(ge=1)
    snapshot_steps: int | None = Field(ge=1)
    max_step_minutes: float | None = Field(default=60, gt=0, le=10_000, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_divisors(self) -> Self:
        if self.micro_batch != "auto" and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}")
        if self.epochs is None and self.max_steps * self.batch_size > _MOST_ROWS:
            raise ValueError(f"max_steps={self.max_steps} × batch_size={self.batch_size}: at most {_MOST_ROWS:,} rows")
        if self.save_steps % self.log_steps:
            raise ValueError(f"log_steps={self.log_steps} does not divide save_steps={self.save_steps}")
        return self

    def steps(self, rows: int) -> int:
        """Computes the number of optimiser steps of a loss whose epoch has `rows` rows.

        Raises:
            InputError: They would train on more than 10⁹ rows.
        """
        steps = self.max_steps if self.epochs is None else math.ceil(round(self.epochs * rows / self.batch_size, 9))
        if steps * self.batch_size > _MOST_ROWS:
            name = "max_steps" if self.epochs is None else "epochs"
            raise InputError(
                f"optim.{name}={getattr(self, name):g}: {steps} steps of batch_size={self.batch_size} are more than "
                f"{_MOST_ROWS:,} rows; at most that many are allowed"
            )
        return steps

    def per_process_batch(self, processes: int) -> int:
        """Computes the number of rollouts (or pairs) per optimiser step and process.

        Raises:
            InputError: The batch cannot be divided among the processes, or a process's share into micro-batches.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise InputError(f"optim.batch_size={self.batch_size} is not divisible by the {processes} processes")
        if self.micro_batch != "auto" and share % self.micro_batch:
            raise InputError(
                f"optim.micro_batch={self.micro_batch} does not divide {share}, "
                f"the share of each of the {processes} processes in optim.batch_size={self.batch_size}"
            )
        return share

    def microbatch_plans(self, processes: int = 1, dropout: bool = False) -> list[tuple[int, bool]]:
        """Returns the micro-batch sizes to try, each with or without gradient checkpointing, fastest first.

        With `dropout`, the size affects the dropout masks and hence the adapter: `auto` is then the whole share of a
        process, and nothing smaller. Checkpointing repeats the same masks and does not change the result.
        """
        sizes = [self.micro_batch] if self.micro_batch != "auto" else _divisors(self.per_process_batch(processes))
        sizes = sizes[:1] if dropout else sizes
        switches = [self.gradient_checkpointing] if self.gradient_checkpointing != "auto" else [False, True]
        return [(size, switch) for switch in switches for size in sizes]


def _divisors(number: int) -> list[int]:
    """Returns all divisors of `number` in descending order."""
    return [d for d in range(number, 0, -1) if number % d == 0]


class TrainConfig(RolloutConfig):
    """The configuration of `train.py`: `conf/train.yaml`. The class of the loss validates `method`."""

    sweep: SweepName
    seed: int = Field(ge=0, lt=2**32)
    init_seed: int | None = Field(ge=0, lt=2**32)
    method: dict[str, Any]
    train_on: TrainOn
    lr: LearningRate
    adapter: Literal["lora", "none"]
    lora_rank: LoraRank | None
    optim: Optim
    evaluation: Evaluation
    benchmark: Benchmarks = Field(default_factory=dict)
    weight_tracking: WeightTracking
    logger: Logger

    @model_validator(mode="before")
    @classmethod
    def _without_lora(cls, content: Any) -> Any:
        """Drops what only an adapter has, so that no manifest records a rank or seed that had no effect."""
        if isinstance(content, dict) and content.get("adapter") == "none":
            return {**content, "lora_rank": None, "init_seed": None}
        return content

    @model_validator(mode="after")
    def _require_lora(self) -> Self:
        if self.adapter == "lora" and (self.lora_rank is None or self.init_seed is None):
            raise ValueError("adapter=lora: lora_rank and init_seed must be set")
        return self

    @property
    def size(self) -> str:
        """Part of a run's name: the adapter's rank, as `r8`, or `full`."""
        return "full" if self.lora_rank is None else f"r{self.lora_rank.r}"

    @property
    def benchmarks(self) -> list[Data]:
        """Benchmarks that a run is scored on: those chosen, else the held-out problems of its own data."""
        return list(self.benchmark.values()) or ([self.data] if self.data.eval_size != 0 else [])
