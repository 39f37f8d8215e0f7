"""Sources of the examples of each training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch

from losslens.config.training import Optim, TrainOn
from losslens.losses import Loss
from losslens.losses.on_policy import OnPolicy
from losslens.models.loading import LoadedModel
from losslens.problems import Problem, Verifier
from losslens.problems.verification import verdicts
from losslens.rollouts.frozen import FrozenRollouts
from losslens.training.batches import Examples, require_sampler, require_weights
from losslens.training.reference import ReferenceCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RolloutSource(Protocol):
    """Provides the examples of each training step; a subclass may sample them from the policy of that step.

    Attributes:
        epoch_length: Number of examples in one epoch.
    """

    epoch_length: int

    def batch(self, step: int, policy: PreTrainedModel) -> Examples:
        """Returns the examples of a step: `optim.batch_size` of them, from whole groups, the same in all processes.

        They must depend on `step` and the weights of `policy` only, and global random generators must be left
        unchanged, so that a resumed run is identical to an uninterrupted one. Sampling is seeded by the step.

        Args:
            step: Number of the step, from 0.
            policy: The model under training, in training mode; `generate_samples` samples without dropout.
        """
        ...

    def score(self, base_logps: Callable[[dict[str, torch.Tensor]], torch.Tensor], pad_token_id: int) -> Path | None:
        """Scores with the base the rollouts that are known before training, and returns the file of their scores.

        Returns None if there are none; the base then scores the rollouts in each step.

        Args:
            base_logps: Computes the base's log-probabilities, shape (N, T), nats, of a batch from `batches.sequences`.
            pad_token_id: Padding token of the inputs.
        """
        return None


class FrozenSource(RolloutSource):
    """Frozen rollouts, in an order that is the same for all losses that train on the same rows.

    Args:
        tokenised: All rollouts, from `tokenise`.
        loss: The loss.
        optim: Batch size and number of steps.
        seed: Seed of the data order.
        train_on: Rollouts that may be trained on; see `filter_rollouts`.
        reference: Cache of the base's log-probabilities; None to score the rollouts in each step.

    Raises:
        InputError: The loss learns from none of the rollouts, or cannot use those of one of the steps.
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
        self._examples = Examples(tokenised, loss, train_on)
        require_weights(self._examples, tokenised, loss, train_on)
        self.epoch_length = len(self._examples)
        examples = optim.steps(self.epoch_length) * optim.batch_size
        self._order = data_order(self.epoch_length, examples, seed).reshape(-1, optim.batch_size)
        if "mismatched_log_ratio" in loss.needs:
            # Fail now rather than in the middle of training.
            for indices in self._order:
                self._examples.take(indices).mismatched()
        self._loss = loss
        self._tokenised = tokenised
        self._reference = reference if "reference" in loss.needs else None

    def require_sampler(self, rollouts: FrozenRollouts) -> None:
        """Checks that `rollouts`, which were tokenised for this source, hold what the loss needs of their sampler.

        Raises:
            InputError: They do not.
        """
        require_sampler(self._examples, self._loss, rollouts)

    def batch(self, step: int, policy: PreTrainedModel) -> Examples:
        """Returns the examples of a step, independent of the policy."""
        return self._examples.take(self._order[step])

    def score(self, base_logps: Callable[[dict[str, torch.Tensor]], torch.Tensor], pad_token_id: int) -> Path | None:
        """See `RolloutSource.score`.

        A run that meets each of its examples scores all rollouts, so that losses that train on different ones share
        the scores. A shorter run scores only the rollouts that it meets, and shares them with runs that meet the same.
        """
        if self._reference is None:
            return None
        scored, places = self._tokenised, self._examples.table["place"].to_numpy()
        if self._order.size < self.epoch_length:
            scored = scored.iloc[np.unique(places[self._examples.rows[self._order]])]
        logps, file = self._reference.logps(scored, base_logps, pad_token_id)
        by_place = dict(zip(scored["place"], logps, strict=True))
        self._examples.reference = [by_place.get(place) for place in places]
        return file


@dataclass(frozen=True)
class OnPolicySource:
    """Source of an on-policy run: the problems to sample for, and what judges the samples.

    Attributes:
        method: The method.
        problems: The training problems.
        verifier: Verifies samples, in a process of its own.
        verify_seconds: Time limit for verifying one sample.
        max_tokens: Maximum length of a sample, tokens.
        teacher: The teacher, if the method needs one; unchanged by training.
    """

    method: OnPolicy
    problems: Sequence[Problem]
    verifier: Verifier
    verify_seconds: float
    max_tokens: int
    teacher: LoadedModel | None = None

    @property
    def epoch_length(self) -> int:
        """Number of samples in one pass over the problems."""
        return len(self.problems) * self.method.group_size

    def order(self, steps: int, samples: int, seed: int) -> np.ndarray:
        """Returns the numbers of the problems of all steps, each once for its group.

        Args:
            steps: Number of steps.
            samples: Samples of a step, over all processes.
            seed: Seed of the order.
        """
        return data_order(len(self.problems), steps * (samples // self.method.group_size), seed)

    def correct(self, numbers: Sequence[int], texts: Sequence[str]) -> list[bool]:
        """Verifies samples of the problems with these numbers; those that cannot be verified are incorrect."""
        problems = [self.problems[number] for number in numbers]
        return [verdict.correct for verdict in verdicts(self.verifier, problems, texts, self.verify_seconds)]


def data_order(rows: int, examples: int, seed: int) -> np.ndarray:
    """Returns `examples` row numbers, where each epoch is a new permutation drawn from (`seed`, epoch).

    Depends on the number of rows only, so that all losses that train on the same rows see them in the same order.
    Epochs follow each other without a gap, so that every batch is full.
    """
    epochs = -(-examples // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[:examples]
