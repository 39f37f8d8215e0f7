"""A family of probability-weighted losses that contains supervised and dynamic fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors, Loss

if TYPE_CHECKING:
    from torch import Tensor


class PAlpha(Loss):
    """(1 − π_t^α)/α on all rollouts; w_t = π_t^α.

    α → 0 is SFT, α = 1 has DFT's gradient; for larger α only tokens with probability near 1 count.

    Source: arXiv 2510.00526 (probability-based family of losses).

    Attributes:
        alpha: α.
    """

    title = "p^α"
    summary = (
        "Probability-weighted fine-tuning: imitates every rollout, each token weighted by a power of its probability."
    )
    paper = "arXiv 2510.00526"
    colour = "#e76300"
    place = 4.5
    uses_reward = False

    name: Literal["p_alpha"]
    alpha: float = Field(default=0.5, gt=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("ignored", gate="probability", stops="π = 1", first_step="π" if self.alpha == 1 else "")

    def terms(self, batch: Batch) -> Tensor:
        """Computes (1 − π_t^α)/α, shape (N, T)."""
        return -(self.alpha * batch.logps).expm1() / self.alpha

    def weights(self, batch: Batch) -> Tensor:
        """Computes π_t^α, shape (N, T)."""
        return (self.alpha * batch.logps).exp()
