"""Pairs of a correct and an incorrect rollout of one prompt, and the base class of losses on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from losslens.losses import Divisor, Loss

if TYPE_CHECKING:
    from losslens.config.training import TrainOn

Pairs = Literal["one", "all"]


def mixed_pairs(rollouts: pd.DataFrame, pairs: Pairs) -> list[tuple[int, int]]:
    """Returns the positions in `rollouts` of each pair's correct and incorrect rollout.

    Args:
        rollouts: Table with the columns `problem_id` and `reward`.
        pairs: `one` takes the first correct and the first incorrect rollout of each prompt that has both; `all` takes
            every correct × incorrect pair.
    """
    positions = pd.Series(np.arange(len(rollouts)), index=rollouts.index)
    positions_of_pairs = []
    for _, group in rollouts.groupby("problem_id", sort=False):
        correct = positions[group.index[group["reward"] > 0]]
        incorrect = positions[group.index[group["reward"] <= 0]]
        positions_of_pairs += [(int(w), int(l)) for w in correct for l in incorrect][: 1 if pairs == "one" else None]
    return positions_of_pairs


class PairLoss(Loss):
    """Base class of losses on pairs.

    They usually train at a lower learning rate than SFT: a tenth of it in arXiv 2606.23740 (DPO 5e-7, SFT 5e-6), a
    twentieth with TRL's defaults (DPO and CPO 1e-6, SFT 2e-5).

    Attributes:
        pairs: See `mixed_pairs`.
    """

    unit = "pair"
    conventional_lr_scale = 0.1

    pairs: Pairs = "one"

    @property
    def divisor(self) -> Divisor:
        """See `Loss.divisor`."""
        return "pairs"

    def select_pairs(self, rollouts: pd.DataFrame) -> list[tuple[int, int]]:
        """See `Loss.select_pairs`."""
        return mixed_pairs(rollouts, self.pairs)

    def learns_from(self, train_on: TrainOn) -> TrainOn:
        """See `Loss.learns_from`: pairs come from mixed groups only, and `one` takes the first pair of each group."""
        if type(self).select_pairs is not PairLoss.select_pairs:
            return train_on
        return "all" if self.pairs == "one" or train_on == "mixed_groups" else train_on
