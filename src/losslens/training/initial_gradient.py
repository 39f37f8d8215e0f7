"""The gradient of a loss before its first step, at the initial adapter and over all rows that it trains on."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from losslens.config.training import Optim
from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.models.adapters import LoraSettings
from losslens.models.loading import LoadedModel, preserved
from losslens.training.batches import Examples
from losslens.training.run import TrainingPlan, make_trainer
from losslens.training.source import RolloutSource
from losslens.updates.lora import LoraUpdate, gradient_steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from losslens.training.trainer import LossTrainer


@dataclass(frozen=True)
class InitialGradient:
    """Step of gradient descent with learning rate 1 from the initial adapter, by module: ΔW = −s·(∂L/∂B)·A.

    Attributes:
        whole: The step, with L the loss of all examples as one batch.
        half: The part of it that comes from the problems of `in_first_half`.
    """

    whole: dict[str, LoraUpdate]
    half: dict[str, LoraUpdate]


class _Pass(RolloutSource):
    """Examples in batches of similar length, the longest first."""

    def __init__(self, examples: Examples, batch_size: int) -> None:
        self._examples = examples
        self.epoch_length = len(examples)
        order = np.argsort(-examples.lengths, kind="stable")
        self._batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, step: int, policy: PreTrainedModel) -> Examples:
        """Returns a batch by its number; the last one may be smaller."""
        return self._examples.take(self._batches[step])


def in_first_half(problem_id: str) -> bool:
    """Returns whether a problem belongs to the first half: by its id alone, so that all losses agree."""
    return hashlib.sha256(problem_id.encode()).digest()[0] % 2 == 0


def initial_gradient(
    loss: Loss, examples: Examples, lora: LoraSettings, initial: Path, base: LoadedModel, batch_size: int
) -> InitialGradient:
    """Computes the gradient of a loss at the initial adapter, with the trainer's own loss and without dropout.

    All examples count as one batch: the sum of the terms is divided by the number of their completion tokens, rollouts
    or pairs (`Loss.divisor`). With respect to A the gradient is 0, since B is. The reference is the model itself.

    Args:
        loss: The loss.
        examples: All examples that it trains on.
        lora: Settings of the adapter.
        initial: Folder of the initial adapter, whose B is 0.
        base: The base; unchanged afterwards.
        batch_size: Examples per forward and backward pass; changes the result by rounding only.

    Raises:
        InputError: The gradient is not finite, or see `make_trainer`.
    """
    problems = examples.table["problem_id"].astype(str).to_numpy()[examples.rows[:, 0]]
    first = np.array([in_first_half(problem) for problem in problems], dtype=bool)
    parts = [_Pass(examples.take(np.flatnonzero(part)), batch_size) for part in (first, ~first)]
    plan = TrainingPlan(loss, 1.0, replace(lora, dropout=0.0), initial, _one_step(batch_size), seed=0)
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the run before
    with preserved(base.model), tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(plan, base, _Pass(examples, batch_size), Path(folder), [])
        # At the base every log-ratio is 0, also that of another prompt's completion.
        trainer.step_statistics = {"mismatched_log_ratio": torch.zeros((), device=base.model.device)}
        trainer.model.eval()
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        divisor, sums = 0, []
        with tqdm(total=sum(map(len, parts)), desc=f"gradient of {loss.name}", unit="batch", leave=False) as bar:
            for part in parts:
                for number in range(len(part)):
                    batch = part.batch(number, trainer.model).collate(base.tokenizer.pad_token_id)
                    divisor += _add_gradient(trainer, batch)
                    bar.update()
                sums.append(gradient_steps_of(trainer.model))
    half, whole = ({name: replace(step, b=step.b / divisor) for name, step in steps.items()} for steps in sums)
    if not all(np.isfinite(step.b).all() for step in whole.values()):
        raise InputError(f"method={loss.name}: the gradient before step 1 is not finite")
    return InitialGradient(whole, half)


def _add_gradient(trainer: LossTrainer, batch: dict[str, Any]) -> int:
    """Adds the gradient of the sum of a batch's terms to that of the parameters, and returns the batch's divisor."""
    inputs = {name: values.to(trainer.args.device) for name, values in batch.items()}
    with trainer.compute_loss_context_manager():
        total = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=1)
    total.backward()
    if trainer.loss.divisor == "tokens":
        return int((inputs["labels"][:, 1:] != -100).sum())
    return len(inputs["pairs" if trainer.loss.divisor == "pairs" else "input_ids"])


def _one_step(batch_size: int) -> Optim:
    """Returns an optimiser for the trainer, which takes no step."""
    return Optim(
        max_steps=1,
        epochs=None,
        batch_size=batch_size,
        micro_batch=batch_size,
        scheduler="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        log_steps=1,
        save_steps=1,
        snapshot_steps=None,
    )
