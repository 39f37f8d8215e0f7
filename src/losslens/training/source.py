"""Where the examples of each step come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch

from losslens.config.training import Optim, TrainOn
from losslens.losses import Loss
from losslens.training.batches import Examples, filter_rollouts
from losslens.training.reference import ReferenceCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RolloutSource(Protocol):
    """Gives a trainer the examples of each step; a subclass may sample them from the policy of that step.

    Attributes:
        epoch_length: Examples that make one epoch.
    """

    epoch_length: int

    def batch(self, step: int, policy: PreTrainedModel) -> Examples:
        """The examples of a step: `optim.batch_size` of them, from whole groups, the same in all processes.

        They follow from `step` and the weights of `policy` alone, and global generators are left as they were: so a run
        goes on from its checkpoint as if it had never stopped. Whatever is drawn is seeded by the step.

        Args:
            step: Its number, from 0.
            policy: The model as it is trained so far, in training mode; `generate_samples` samples without dropout.
        """
        ...

    def score(self, base_logps: Callable[[dict[str, torch.Tensor]], torch.Tensor], pad_token_id: int) -> Path | None:
        """Has the base score what is known before the first step, if anything; the file that keeps it.

        What is not known by then, the base scores in each step.

        Args:
            base_logps: Gives the base's log-probabilities, shape (N, T), nats, of what `batches.sequences` gives.
            pad_token_id: What fills up sequences.
        """
        return None


class FrozenSource(RolloutSource):
    """Frozen rollouts, in the one order in which all losses that train on the same rows meet them.

    Args:
        tokenised: All rollouts, from `tokenise`.
        loss: What learns from them.
        optim: The size of a batch, and how many there are.
        seed: Of the order.
        train_on: Which of them may be learnt from; see `filter_rollouts`.
        reference: Where the base's log-probabilities are kept; None: it scores them in each step.

    Raises:
        InputError: There is nothing in them to learn from, or not in the batch of a step.
    """

    def __init__(
        self,
        tokenised: pd.DataFrame,
        loss: Loss,
        optim: Optim,
        seed: int,
        train_on: TrainOn = "all",
        reference: ReferenceCache | None = None,
    ) -> None:
        self._examples = Examples(filter_rollouts(tokenised, train_on), loss)
        self.epoch_length = len(self._examples)
        examples = optim.steps(self.epoch_length) * optim.batch_size
        self._order = data_order(self.epoch_length, examples, seed).reshape(-1, optim.batch_size)
        if "mismatched_log_ratio" in loss.needs:
            # Refused now, and not in the middle of training.
            for numbers in self._order:
                self._examples.take(numbers).mismatched()
        self._tokenised = tokenised
        self._reference = reference if "reference" in loss.needs else None

    def batch(self, step: int, policy: PreTrainedModel) -> Examples:
        """The next examples in the order, whatever the policy."""
        return self._examples.take(self._order[step])

    def score(self, base_logps: Callable[[dict[str, torch.Tensor]], torch.Tensor], pad_token_id: int) -> Path | None:
        """See `RolloutSource.score`: it scores all rollouts, as other runs may learn from others of them."""
        if self._reference is None:
            return None
        known, file = self._reference.logps(self._tokenised, base_logps, pad_token_id)
        self._examples.reference = [known[place] for place in self._examples.table["place"]]
        return file


def data_order(rows: int, examples: int, seed: int) -> np.ndarray:
    """Which row is met when: `examples` row numbers, each epoch a new permutation drawn from (`seed`, epoch).

    It depends on the number of rows alone, so all losses that train on the same rows meet them in the same order,
    and every batch is full.
    """
    epochs = -(-examples // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[:examples]
