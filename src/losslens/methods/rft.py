"""Rejection-sampling fine-tuning: only what the verifier accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pandas as pd

from losslens.errors import InputError
from losslens.methods import Pointwise, Scored

if TYPE_CHECKING:
    from torch import Tensor


def rft(scored: Scored) -> Tensor:
    """1[r = 1]·ℓ_t: the negative log-likelihood of right rollouts, 0 for wrong ones.

    Source: Yuan et al. 2023, arXiv 2308.01825.

    Returns:
        Shape (N, T).
    """
    return -scored.logps * (scored.reward > 0).to(scored.logps.dtype)[:, None]


class Rft(Pointwise):
    """`method=rft`.

    Attributes:
        wrong: `mask` keeps wrong rollouts in their place with weight 0, so that all pointwise methods see the same
            batches; `filter` drops them before batching.
        deduplicate: Whether only the first of a prompt's identical right completions counts (the source's distinct
            reasoning paths). The others count as wrong: masked or dropped, and among `train/logps/wrong`.
    """

    name: Literal["rft"]
    wrong: Literal["mask", "filter"] = "mask"
    deduplicate: bool = False

    def rows(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """See `Pointwise.rows`."""
        if not (rollouts["reward"] > 0).any():
            raise InputError(f"method={self.name}: the rollouts hold no right one (column reward is nowhere 1)")
        rows = rollouts
        if self.deduplicate:
            right = rows["reward"] > 0
            again = right & rows[right].duplicated(["problem_id", "completion"]).reindex(rows.index, fill_value=False)
            rows = rows.assign(reward=rows["reward"].mask(again, 0.0))
        return rows[rows["reward"] > 0] if self.wrong == "filter" else rows

    def loss(self, scored: Scored) -> Tensor:
        """See `rft`."""
        return rft(scored)
