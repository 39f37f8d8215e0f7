"""Supervised fine-tuning on every rollout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from losslens.methods import Pointwise, Scored

if TYPE_CHECKING:
    from torch import Tensor


def sft(scored: Scored) -> Tensor:
    """ℓ_t = −log π_t on all rollouts, whatever their reward.

    Returns:
        Shape (N, T).
    """
    return -scored.logps


class Sft(Pointwise):
    """`method=sft`."""

    name: Literal["sft"]

    @property
    def uses_reward(self) -> bool:
        """See `Method.uses_reward`."""
        return False

    def loss(self, scored: Scored) -> Tensor:
        """See `sft`."""
        return sft(scored)
