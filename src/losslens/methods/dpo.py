"""Direct preference optimisation on pairs of a right and a wrong rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from losslens.errors import InputError
from losslens.methods import Pairwise

if TYPE_CHECKING:
    from torch import Tensor

    from losslens.config import TrainOn

# The losses of TRL's DPOTrainer that are defined for a pair by itself and need no further setting.
LossType = Literal["sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]


def dpo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """−log σ(β[log π_θ(y_w)/π_ref(y_w) − log π_θ(y_l)/π_ref(y_l)]).

    Args:
        chosen: log π_θ(y_w | x) summed over the tokens, shape (pairs,).
        rejected: log π_θ(y_l | x), likewise.
        reference_chosen: log π_ref(y_w | x) of the base (adapter off), likewise.
        reference_rejected: log π_ref(y_l | x), likewise.
        beta: β.

    Source: arXiv 2305.18290, eq. 7.

    Returns:
        Shape (pairs,).
    """
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


class Dpo(Pairwise):
    """`method=dpo`.

    Attributes:
        beta: β.
        loss_type: `sigmoid` is DPO; the others are passed to TRL's `DPOTrainer`.
        pairs: `one` takes the first right and the first wrong rollout of each prompt that has both; `all` takes every
            right × wrong pair.
    """

    name: Literal["dpo"]
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    loss_type: LossType = "sigmoid"
    pairs: Literal["one", "all"] = "one"

    def pair_rows(self, rollouts: pd.DataFrame) -> list[tuple[int, int]]:
        """See `Pairwise.pair_rows`."""
        positions = pd.Series(np.arange(len(rollouts)), index=rollouts.index)
        pairs = []
        for _, group in rollouts.groupby("problem_id", sort=False):
            right = positions[group.index[group["reward"] > 0]]
            wrong = positions[group.index[group["reward"] <= 0]]
            pairs += [(int(w), int(l)) for w in right for l in wrong][: 1 if self.pairs == "one" else None]
        if not pairs:
            raise InputError(f"method={self.name}: no prompt has both a right and a wrong rollout (no mixed group)")
        return pairs

    def learns_from(self, train_on: TrainOn) -> TrainOn:
        """See `Method.learns_from`: all pairs are of mixed groups, and `one` is the first of each group."""
        return "all" if self.pairs == "one" or train_on == "mixed_groups" else train_on

    def trainer_options(self) -> dict[str, Any]:
        """See `Pairwise.trainer_options`."""
        return {"beta": self.beta, "loss_type": [self.loss_type]}

    def loss(self, chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        """See `dpo`."""
        return dpo(chosen, rejected, reference_chosen, reference_rejected, self.beta)
