"""Learning rate, adapter, optimiser: the configuration of `train.py`."""

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

# Which of the rollouts a method may learn from: losslens.training.batches.
TrainOn = Literal["all", "mixed_groups", "paired_rollouts"]
# What identities and earlier manifests call it.
TRAIN_ON = Formerly("train_on", {"paired_rollouts": "dpo_rows"})


class LearningRate(Section):
    """The peak learning rate: `peak` times `factor`, or times what is conventional for the loss where that is None."""

    name: FolderName
    peak: Annotated[float, Formerly("base")] = Field(gt=0, allow_inf_nan=False)
    factor: float | None = Field(gt=0, allow_inf_nan=False)

    def of(self, conventional_scale: float) -> float:
        """Peak learning rate of a loss whose `conventional_lr_scale` is given."""
        rate = self.peak * (conventional_scale if self.factor is None else self.factor)
        return float(f"{rate:.12g}")  # a tenth of 1e-3 and 1e-4 are one rate


class LoraRank(Section):
    """Size of the adapter."""

    r: int = Field(ge=1)
    alpha: float | None = Field(gt=0, allow_inf_nan=False)
    dropout: float = Field(ge=0, lt=1)

    @property
    def scale_numerator(self) -> float:
        """LoRA's alpha: twice the rank unless it is set."""
        return 2.0 * self.r if self.alpha is None else self.alpha


class Optim(Section):
    """The optimiser and its schedule.

    An option that is added here gets its default here too: then runs from before it keep their identity.
    """

    max_steps: int = Field(ge=1)
    epochs: float | None = Field(gt=0, allow_inf_nan=False)
    batch_size: int = Field(ge=1)
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

    @model_validator(mode="after")
    def _steps_and_batches_fit(self) -> Self:
        if self.micro_batch != "auto" and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}")
        if self.save_steps % self.log_steps:
            raise ValueError(f"log_steps={self.log_steps} does not divide save_steps={self.save_steps}")
        return self

    def steps(self, rows: int) -> int:
        """Optimiser steps of a method whose epoch has `rows` rows."""
        return self.max_steps if self.epochs is None else math.ceil(round(self.epochs * rows / self.batch_size, 9))

    def per_process_batch(self, processes: int) -> int:
        """Rollouts (or pairs) of one optimiser step that each of so many processes computes.

        Raises:
            InputError: The batch, or a process's share of it, cannot be divided so.
        """
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise InputError(f"optim.batch_size={self.batch_size} cannot be shared by {processes} processes")
        if self.micro_batch != "auto" and share % self.micro_batch:
            raise InputError(
                f"optim.micro_batch={self.micro_batch} does not divide {share}, "
                f"the share of each of {processes} processes in optim.batch_size={self.batch_size}"
            )
        return share

    def microbatch_plans(self, processes: int = 1, dropout: bool = False) -> list[tuple[int, bool]]:
        """Examples in one forward pass, and whether with gradient checkpointing: what to try, the quickest first.

        With `dropout` the number decides what is dropped, and so the adapter: `auto` is then all that a process
        computes, and nothing smaller. Checkpointing draws the same again, and changes nothing.
        """
        sizes = [self.micro_batch] if self.micro_batch != "auto" else _divisors(self.per_process_batch(processes))
        sizes = sizes[:1] if dropout else sizes
        switches = [self.gradient_checkpointing] if self.gradient_checkpointing != "auto" else [False, True]
        return [(size, switch) for switch in switches for size in sizes]


def _divisors(number: int) -> list[int]:
    """The divisors, from the largest to 1."""
    return [d for d in range(number, 0, -1) if number % d == 0]


class TrainConfig(RolloutConfig):
    """The configuration of `train.py`: `conf/train.yaml`. `method` is checked by the method's own class."""

    sweep: SweepName
    seed: int = Field(ge=0, lt=2**32)
    init_seed: int = Field(ge=0, lt=2**32)
    method: dict[str, Any]
    train_on: TrainOn
    lr: LearningRate
    lora_rank: LoraRank
    optim: Optim
    evaluation: Evaluation
    benchmark: Benchmarks = Field(default_factory=dict)
    weight_tracking: WeightTracking
    logger: Logger

    @property
    def benchmarks(self) -> list[Data]:
        """What a run is scored on: the benchmarks that are named, else the held-out problems of its own data."""
        return list(self.benchmark.values()) or ([self.data] if self.data.eval_size != 0 else [])
