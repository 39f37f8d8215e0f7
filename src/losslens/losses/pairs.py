"""Pairs of a correct and an incorrect rollout of one prompt, and what all losses on them share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from losslens.core.errors import InputError
from losslens.losses import Loss

if TYPE_CHECKING:
    from losslens.config.training import TrainOn

Pairs = Literal["one", "all"]


def mixed_pairs(rollouts: pd.DataFrame, pairs: Pairs, asked_by: str) -> list[tuple[int, int]]:
    """Positions in `rollouts` of the correct and the incorrect one of each pair.

    Args:
        rollouts: With `problem_id` and `reward`.
        pairs: `one` takes the first correct and the first incorrect rollout of each prompt that has both; `all` takes
            every correct × incorrect pair.
        asked_by: The option that asks for pairs, for the message.

    Raises:
        InputError: No prompt has both.
    """
    positions = pd.Series(np.arange(len(rollouts)), index=rollouts.index)
    found = []
    for _, group in rollouts.groupby("problem_id", sort=False):
        correct = positions[group.index[group["reward"] > 0]]
        incorrect = positions[group.index[group["reward"] <= 0]]
        found += [(int(w), int(l)) for w in correct for l in incorrect][: 1 if pairs == "one" else None]
    if not found:
        raise InputError(f"{asked_by}: no prompt has both a right and a wrong rollout (no mixed group)")
    return found


class PairLoss(Loss):
    """A loss on pairs.

    It is usually trained more slowly than SFT: at a tenth of its rate in arXiv 2606.23740 (DPO 5e-7, SFT 5e-6), at a
    twentieth by TRL's defaults (DPO and CPO 1e-6, SFT 2e-5).

    Attributes:
        pairs: See `mixed_pairs`.
    """

    unit = "pair"
    normaliser = "pairs"
    conventional_lr_scale = 0.1

    pairs: Pairs = "one"

    def select_pairs(self, rollouts: pd.DataFrame) -> list[tuple[int, int]]:
        """See `Loss.select_pairs`."""
        return mixed_pairs(rollouts, self.pairs, f"method={self.name}")

    def learns_from(self, train_on: TrainOn) -> TrainOn:
        """See `Loss.learns_from`: all pairs are of mixed groups, and `one` is the first of each group."""
        if type(self).select_pairs is not PairLoss.select_pairs:
            return train_on
        return "all" if self.pairs == "one" or train_on == "mixed_groups" else train_on
