"""Reasoning preference optimisation: DPO with a likelihood term on the chosen completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors
from losslens.losses.margins import FUNCTIONS, BetaLoss

if TYPE_CHECKING:
    from torch import Tensor


class Rpo(BetaLoss):
    """−log σ(u) − α·(1/|y_w|)·Σ_t log π_t of the chosen completion, u = β(h_w − h_l), the reference being the base.

    w_t = β·σ(−u) + α/|y_w| for the chosen completion, −β·σ(−u) for the rejected one.

    Source: arXiv 2404.19733; TRL's `loss_type=["sigmoid", "sft"]` with `loss_weights=[1, α]`, whose likelihood is
    averaged over the chosen tokens of a micro-batch, so that long completions count more. The learning rate with
    `lr=conventional` is DPO's: our choice.

    Attributes:
        alpha: α; 0 is DPO.
    """

    title = "RPO"
    summary = (
        "Reasoning preference optimisation: learns from pairs to prefer the correct rollout, as DPO, and imitates it, "
        "as RFT."
    )
    paper = "arXiv 2404.19733"
    colour = "#a87800"
    place = 8.3

    name: Literal["rpo"]
    alpha: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        if self.alpha == 0:
            return FUNCTIONS["sigmoid"].factors
        return Factors("signed", saturation="logistic", stops="the margin is large and π_w = 1")

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        likelihood, _ = batch.split_pairs(batch.logps.sum(dim=1) / batch.lengths)
        return FUNCTIONS["sigmoid"].terms(self.margins(batch)) - self.alpha * likelihood

    def weights(self, batch: Batch) -> Tensor:
        """Computes ±β·σ(−u), plus α/|y_w| for the chosen completion, shape (N, T)."""
        m = self.margins(batch)
        chosen, rejected = FUNCTIONS["sigmoid"].weights(m)
        return batch.over_tokens_of_pairs(chosen + self.alpha / m.chosen_length, rejected)
