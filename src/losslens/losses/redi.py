"""Reinforcement distillation: correct rollouts up and incorrect ones down, by their mean log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Divisor, Factors, Loss

if TYPE_CHECKING:
    from torch import Tensor


class Redi(Loss):
    """−m for a correct rollout, α·m for an incorrect one, m = (1/|y|)·Σ_t log π_t; w_t = 1/|y| or −α/|y|.

    Unbounded below for α > 0: nothing but the smaller weight keeps the incorrect rollouts from falling without end.
    α = 0 is RFT by rollout instead of by token.

    Source: arXiv 2505.24850 (α = 0.8, learning rate 1e-6, a fifth of arXiv 2606.23740's for SFT, after a first stage of
    fine-tuning on correct rollouts), which divides by pairs of a correct and an incorrect rollout: the same up to a
    factor of two with `train_on=paired_rollouts`.

    Attributes:
        alpha: α.
    """

    title = "REDI"
    summary = (
        "Reinforcement distillation: raises the mean log-probability of correct rollouts and lowers that of incorrect "
        "ones, a little less strongly."
    )
    paper = "arXiv 2505.24850"
    colour = "#3ae264"
    place = 5.6
    unit = "rollout"
    conventional_lr_scale = 0.2

    name: Literal["redi"]
    alpha: float = Field(default=0.8, ge=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        if self.alpha == 0:
            return Factors("correct only", length="rollouts", stops="π = 1")
        return Factors("signed", length="rollouts", stops="never for incorrect rollouts")

    @property
    def divisor(self) -> Divisor:
        """See `Loss.divisor`."""
        return "rollouts"

    @property
    def bounded(self) -> bool:
        """See `Loss.bounded`."""
        return self.alpha == 0

    def terms(self, batch: Batch) -> Tensor:
        """Computes −m or α·m, shape (N,)."""
        return -self._sign(batch) * batch.logps.sum(dim=1) / batch.lengths

    def weights(self, batch: Batch) -> Tensor:
        """Computes 1/|y| or −α/|y|, shape (N, T)."""
        return batch.over_tokens(self._sign(batch) / batch.lengths)

    def _sign(self, batch: Batch) -> Tensor:
        """1 or −α, shape (N,)."""
        correct = batch.correct.to(batch.logps.dtype)
        return correct - self.alpha * (1 - correct)
