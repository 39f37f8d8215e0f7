"""Calibrated direct preference optimisation: DPO whose log-ratios are also regressed to fixed values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from losslens.losses import Batch, Factors
from losslens.losses.margins import FUNCTIONS, BetaLoss

if TYPE_CHECKING:
    from torch import Tensor


class CalDpo(BetaLoss):
    """−log σ(Δ) + ½[(h_w − 1/2β)² + (h_l + 1/2β)²], Δ = h_w − h_l, the reference being the base.

    w_t = σ(−Δ) + 1/2β − h_w for the chosen completion, −σ(−Δ) − 1/2β − h_l for the rejected one.

    Source: arXiv 2412.14516 and the authors' code (tengxiao1/Cal-DPO), which has no β within σ, and the ½. The
    learning rate with `lr=conventional` is DPO's: our choice.
    """

    title = "Cal-DPO"
    summary = (
        "Calibrated direct preference optimisation: DPO that also holds the correct rollout above the base and the "
        "incorrect one below it, by a fixed amount."
    )
    paper = "arXiv 2412.14516"
    colour = "#f03060"
    place = 8.2

    name: Literal["cal_dpo"]

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("signed", saturation="regression", stops="h_w ≈ 1/2β, h_l ≈ −1/2β", first_step="pair ±1")

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        from torch.nn.functional import logsigmoid

        m = self.margins(batch)
        return -logsigmoid(m.chosen - m.rejected) + 0.5 * FUNCTIONS["sppo_hard"].terms(m)

    def weights(self, batch: Batch) -> Tensor:
        """Computes ±(σ(−Δ) + 1/2β) − h, shape (N, T)."""
        m = self.margins(batch)
        contrast = (m.rejected - m.chosen).sigmoid()
        chosen, rejected = FUNCTIONS["sppo_hard"].weights(m)
        return batch.over_tokens_of_pairs(contrast + 0.5 * chosen, -contrast + 0.5 * rejected)
