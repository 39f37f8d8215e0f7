"""One dial from supervised fine-tuning to dynamic fine-tuning and beyond."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Loss

if TYPE_CHECKING:
    from torch import Tensor


class PAlpha(Loss):
    """(1 − π_t^α)/α on all rollouts; w_t = π_t^α.

    α → 0 is SFT, α = 1 has DFT's gradient, and above it only tokens that are nearly certain count.

    Source: arXiv 2510.00526 (its family of losses by probability).

    Attributes:
        alpha: α.
    """

    title = "p^α"
    summary = (
        "Probability-weighted fine-tuning: imitates every rollout, each token by a power of how much it is expected."
    )
    paper = "arXiv 2510.00526"
    colour = "#e76300"
    place = 4.5
    uses_reward = False

    name: Literal["p_alpha"]
    alpha: float = Field(default=0.5, gt=0, allow_inf_nan=False)

    def terms(self, batch: Batch) -> Tensor:
        """(1 − π_t^α)/α, shape (N, T)."""
        return -(self.alpha * batch.logps).expm1() / self.alpha

    def weights(self, batch: Batch) -> Tensor:
        """π_t^α, shape (N, T)."""
        return (self.alpha * batch.logps).exp()
