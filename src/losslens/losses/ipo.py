"""Identity preference optimisation: regresses the log-ratios of pairs to a fixed margin."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors
from losslens.losses.margins import FUNCTIONS, MarginLoss, Margins, PairFunction

if TYPE_CHECKING:
    from torch import Tensor


class Ipo(MarginLoss):
    """(d − 1/2τ)², d = h_w/|y_w| − h_l/|y_l| (`averaged`) or h_w − h_l (`summed`), the reference being the base.

    w_t = ±2(1/2τ − d), divided by |y| if `averaged`: zero at the target 1/2τ and reversed beyond it.

    Source: arXiv 2310.12036, eq. 17, which prints the sums; TRL averages, and reports that the authors confirmed this
    as the form of their results. `averaged` is `dpo` with `loss_type=ipo` and β = τ.

    Attributes:
        tau: τ.
        form: Log-ratios averaged over the tokens of a completion, or summed.
    """

    title = "IPO"
    summary = (
        "Identity preference optimisation: learns from pairs to prefer the correct rollout by a fixed margin, and no "
        "more than that."
    )
    paper = "arXiv 2310.12036"
    colour = "#784800"
    place = 8.1

    name: Literal["ipo"]
    tau: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    form: Literal["averaged", "summed"] = "averaged"

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return replace(self._function.factors, stops="the margin is 1/2τ")

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        return self._function.terms(self.margins(batch))

    def weights(self, batch: Batch) -> Tensor:
        """Computes ±2(1/2τ − d), divided by |y| if averaged, shape (N, T)."""
        return batch.over_tokens_of_pairs(*self._function.weights(self.margins(batch)))

    def margins(self, batch: Batch) -> Margins:
        """See `MarginLoss.margins`."""
        return Margins.of(batch, self.tau)

    @property
    def _function(self) -> PairFunction:
        return FUNCTIONS["ipo" if self.form == "averaged" else "ipo_summed"]
