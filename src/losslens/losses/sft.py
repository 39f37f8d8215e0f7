"""Supervised fine-tuning on every rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from losslens.losses import Batch, Loss

if TYPE_CHECKING:
    from torch import Tensor


class Sft(Loss):
    """ℓ_t = −log π_t on all rollouts, whatever their reward; w_t = 1."""

    title = "SFT"
    summary = "Supervised fine-tuning: imitates every rollout, correct or incorrect."
    colour = "#3f90da"
    place = 1
    uses_reward = False

    name: Literal["sft"]

    def terms(self, batch: Batch) -> Tensor:
        """Computes −log π_t, shape (N, T)."""
        return -batch.logps

    def weights(self, batch: Batch) -> Tensor:
        """Returns ones, shape (N, T)."""
        return batch.logps.new_ones(batch.logps.shape)
