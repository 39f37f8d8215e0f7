"""Rejection-sampling fine-tuning: only what the verifier accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import pandas as pd

from losslens.config.identity import Formerly
from losslens.core.errors import InputError
from losslens.losses import Batch, Loss

if TYPE_CHECKING:
    from torch import Tensor


class Rft(Loss):
    """1[r = 1]·ℓ_t: the negative log-likelihood of correct rollouts, 0 for incorrect ones; w_t = 1[r = 1].

    Source: Yuan et al. 2023, arXiv 2308.01825.

    Attributes:
        incorrect: `mask` keeps incorrect rollouts in their place with weight 0, so that all losses on single rollouts
            see the same batches; `drop` leaves them out before batching.
        deduplicate: Whether only the first of a prompt's identical correct completions counts (the source's distinct
            reasoning paths). The others count as incorrect: masked or dropped, and among `train/logps/incorrect`.
    """

    title = "RFT"
    summary = "Rejection-sampling fine-tuning: imitates the right rollouts and ignores the wrong ones."
    paper = "arXiv 2308.01825"
    colour = "#ffa90e"
    place = 2

    name: Literal["rft"]
    incorrect: Annotated[Literal["mask", "drop"], Formerly("wrong", {"drop": "filter"})] = "mask"
    deduplicate: bool = False

    def select(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """See `Loss.select`."""
        if not (rollouts["reward"] > 0).any():
            raise InputError(f"method={self.name}: the rollouts hold no right one (column reward is nowhere 1)")
        rows = rollouts
        if self.deduplicate:
            right = rows["reward"] > 0
            again = right & rows[right].duplicated(["problem_id", "completion"]).reindex(rows.index, fill_value=False)
            rows = rows.assign(reward=rows["reward"].mask(again, 0.0))
        return rows[rows["reward"] > 0] if self.incorrect == "drop" else rows

    def terms(self, batch: Batch) -> Tensor:
        """−1[r = 1]·log π_t, shape (N, T)."""
        return -batch.logps * batch.correct.to(batch.logps.dtype)[:, None]

    def weights(self, batch: Batch) -> Tensor:
        """1[r = 1], shape (N, T)."""
        return batch.over_tokens(batch.correct.to(batch.logps.dtype))
