"""Rejection-sampling fine-tuning: supervised fine-tuning on correct rollouts only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import pandas as pd

from losslens.config.identity import Formerly
from losslens.losses import Batch, Factors
from losslens.losses.ratio import RatioLoss

if TYPE_CHECKING:
    from torch import Tensor


class Rft(RatioLoss):
    """1[r = 1]·ℓ_t: the negative log-likelihood for correct rollouts, 0 for incorrect ones; w_t = 1[r = 1].

    Source: Yuan et al. 2023, arXiv 2308.01825. With `ratio=clip` it is RAFT++ (arXiv 2504.11343), −min(ρ_t, 1 + ε_high)
    for correct rollouts; see `RatioLoss`.

    Attributes:
        incorrect: `mask` keeps incorrect rollouts in the batch with weight 0, so that all losses on single rollouts
            see the same batches; `drop` removes them before batching.
        deduplicate: Count only the first of a prompt's identical correct completions (the source's distinct reasoning
            paths). The others count as incorrect: masked or dropped, and included in `train/logps/incorrect`.
    """

    title = "RFT"
    summary = "Rejection-sampling fine-tuning: imitates the correct rollouts and ignores the incorrect ones."
    paper = "arXiv 2308.01825"
    colour = "#ffa90e"
    place = 2

    name: Literal["rft"]
    incorrect: Annotated[Literal["mask", "drop"], Formerly("wrong", {"drop": "filter"})] = "mask"
    deduplicate: bool = False

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return self.with_ratio(Factors("correct only", stops="π = 1", first_step="correct only"))

    def select(self, rollouts: pd.DataFrame) -> pd.DataFrame:
        """See `Loss.select`."""
        rows = rollouts
        if self.deduplicate:
            correct = rows["reward"] > 0
            duplicated = rows[correct].duplicated(["problem_id", "completion"]).reindex(rows.index, fill_value=False)
            rows = rows.assign(reward=rows["reward"].mask(correct & duplicated, 0.0))
        return rows[rows["reward"] > 0] if self.incorrect == "drop" else rows

    def multiplier(self, batch: Batch) -> Tensor:
        """Returns 1[r = 1], shape (N, 1)."""
        return batch.correct.to(batch.logps.dtype)[:, None]

    def terms(self, batch: Batch) -> Tensor:
        """Computes −1[r = 1]·log π_t, or its form with a ratio, shape (N, T)."""
        return self.surrogate(batch)

    def weights(self, batch: Batch) -> Tensor:
        """Computes 1[r = 1], or that of the form with a ratio, shape (N, T)."""
        return self.surrogate_weights(batch)
