"""All that is used of TRL beyond what it documents: a new release of TRL is looked at here.

`tests/test_trl_internals.py` holds the releases below against pyproject.toml, and sees to it that no other module goes
through these doors. A release is added when `tests/test_trainers.py` passes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, use_adapter

__all__ = ["HEAD", "TESTED", "FusedCausalLMOutput", "OpenSFTTrainer", "use_adapter"]

# Minor releases that the trainer works with, ascending. Before the first one there is no fused head to call.
TESTED = ("1.15", "1.16")
# What TRL's fused head, which `SFTTrainer` puts onto the model, is called with; `lm_head` answers to the same.
HEAD: Mapping[str, bool] = {"use_cache": False, "fused_lm_head": True}


class OpenSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with its own metrics in the hands of whoever computes the loss."""

    # Otherwise the loss is divided by the steps that are accumulated; the subclass divides by what the batch holds.
    loss_is_scaled_for_ga = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Otherwise the tokens of the effective batch are counted only for models whose forward takes any keyword.
        self.model_accepts_loss_kwargs = True

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL would write one into each checkpoint, and they are gone when the run has ended."""

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Adds numbers of a step to those that are averaged until the next logged one."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def count_tokens(self, tokens: float) -> None:
        """Adds the tokens of a step to those that the run has seen, which are logged as `num_tokens`."""
        self._total_train_tokens += tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
