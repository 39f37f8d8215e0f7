"""A*-PO: regression of the log-ratio to the base on the advantage over the optimal value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from losslens.losses import Batch, Divisor, Factors, Loss, Need

if TYPE_CHECKING:
    from torch import Tensor


class AStarPo(Loss):
    """(β₂·h − (r − V*))² for each rollout, V* = β₁·log mean_i exp(r_i/β₁) over the rollouts of its prompt.

    h = log π_θ(y | x) − log π_ref(y | x), the reference being the base; V* estimates the optimal value of the prompt
    if the rollouts are the base's own, and is too high or too low for others'. w_t = 2β₂·((r − V*) − β₂·h): it stops
    where h = (r − V*)/β₂, which with β₂ = 1e-3 is hundreds of nats away, so that the weights hardly change: β₂ near 0.1
    saturates. As β₁ → ∞, V* → r̄, and at the base the weights are offline GRPO's without bias, times 2β₂. Rollouts of
    prompts without a correct rollout have weight 0: TRL drops these prompts, and divides by the others'.

    Source: arXiv 2505.20686; TRL's `A2POTrainer`, whose second stage samples anew from the current policy; here both
    stages have the same rollouts. The learning rate, a tenth of SFT's, is our choice: that of KTO and of the losses on
    pairs, whose terms depend on h as well.

    Attributes:
        beta1: β₁; towards 0, V* becomes the largest reward of the prompt, for large β₁ the mean.
        beta2: β₂.
    """

    title = "A*-PO"
    summary = (
        "A*-PO: moves each rollout's log-ratio to the base towards a target, above 0 for correct and below 0 for "
        "incorrect rollouts, the further from it the more strongly."
    )
    paper = "arXiv 2505.20686"
    colour = "#3ab8e2"
    place = 5.8
    unit = "rollout"
    conventional_lr_scale = 0.1

    name: Literal["a_star_po"]
    beta1: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    beta2: float = Field(default=1e-3, gt=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("relative", saturation="regression", stops="h = (r − V*)/β₂")

    @property
    def divisor(self) -> Divisor:
        """See `Loss.divisor`."""
        return "rollouts"

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"reference"})

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Computes the column `optimal_value`, V*, which is 0 for prompts without a correct rollout."""
        rate = (rollouts["reward"] > 0).astype(np.float64).groupby(rollouts["group"]).transform("mean").to_numpy()
        # With the largest reward, 1, taken out, so that it is exact for small and for large β₁.
        value = 1 + self.beta1 * np.log1p(
            (1 - rate) * np.expm1(-1 / self.beta1), where=rate > 0, out=np.zeros(len(rate))
        )
        return {"optimal_value": np.where(rate > 0, value, 0.0)}

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each rollout, shape (N,)."""
        return self._error(batch) ** 2

    def weights(self, batch: Batch) -> Tensor:
        """Computes 2β₂·((r − V*) − β₂·h), shape (N, T)."""
        return batch.over_tokens(-2 * self.beta2 * self._error(batch))

    def _error(self, batch: Batch) -> Tensor:
        """β₂·h − (r − V*), and 0 for prompts without a correct rollout, shape (N,)."""
        value = batch.columns["optimal_value"].to(batch.logps.dtype)
        error = self.beta2 * batch.log_ratio - (batch.correct.to(batch.logps.dtype) - value)
        return error * (value > 0)
