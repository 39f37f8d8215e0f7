"""Supervised fine-tuning on every rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from losslens.losses import Batch, Factors
from losslens.losses.ratio import RatioLoss

if TYPE_CHECKING:
    from torch import Tensor


class Sft(RatioLoss):
    """ℓ_t = −log π_t on all rollouts, whatever their reward; w_t = 1.

    With `ratio=clip` it is PSFT (arXiv 2508.17784), −min(ρ_t, 1 + ε_high): the same gradient at ρ = 1, and none from
    tokens that have become 1 + ε_high times as likely. The source renews the denominator during
    training; here it stays that of the sampler or the base. See `RatioLoss`.
    """

    title = "SFT"
    summary = "Supervised fine-tuning: imitates every rollout, correct or incorrect."
    colour = "#3f90da"
    place = 1
    uses_reward = False

    name: Literal["sft"]

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return self.with_ratio(Factors("ignored", stops="π = 1", first_step="uniform"))

    def multiplier(self, batch: Batch) -> Tensor:
        """Returns ones, shape (N, 1)."""
        return batch.logps.new_ones(len(batch.logps), 1)

    def terms(self, batch: Batch) -> Tensor:
        """Computes −log π_t, or its form with a ratio, shape (N, T)."""
        return self.surrogate(batch)

    def weights(self, batch: Batch) -> Tensor:
        """Returns ones, or those of the form with a ratio, shape (N, T)."""
        return self.surrogate_weights(batch)
