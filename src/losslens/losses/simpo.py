"""Simple preference optimisation: compares mean log-probabilities of pairs, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors
from losslens.losses.pairs import PairLoss

if TYPE_CHECKING:
    from torch import Tensor


class SimPo(PairLoss):
    """−log σ(β(m_w − m_l) − γ), m = (1/|y|)·Σ_t log π_t.

    w_t = ±β·σ(γ − β(m_w − m_l))/|y|. Source: arXiv 2405.14734, eq. 6; TRL's CPO with `loss_type="simpo"`,
    `cpo_alpha=0`.

    Attributes:
        beta: β.
        gamma: γ, the target margin: absolute, as in the paper and in TRL; the authors' code takes γ/β.
    """

    title = "SimPO"
    summary = (
        "Simple preference optimisation: learns from pairs to prefer the correct rollout by its mean log-probability, "
        "without a reference model."
    )
    paper = "arXiv 2405.14734"
    colour = "#b9ac70"
    place = 7

    name: Literal["simpo"]
    beta: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("signed", saturation="logistic", length="rollouts", stops="the margin of the means is large")

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(self._margin(batch))

    def weights(self, batch: Batch) -> Tensor:
        """Computes ±β·σ(−margin)/|y|, shape (N, T)."""
        weight = self.beta * (-self._margin(batch)).sigmoid()
        chosen, rejected = batch.split_pairs(batch.lengths)
        return batch.over_tokens_of_pairs(weight / chosen, -weight / rejected)

    def _margin(self, batch: Batch) -> Tensor:
        chosen, rejected = batch.split_pairs(batch.logps.sum(dim=1) / batch.lengths)
        return self.beta * (chosen - rejected) - self.gamma
