"""Advantage-weighted regression: imitation of all rollouts, exponentially weighted by their advantage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from losslens.losses import Batch, Factors, Loss, Origin
from losslens.losses.grpo import group_advantages

if TYPE_CHECKING:
    from torch import Tensor


class Awr(Loss):
    """min(exp(Â_i/β), c)·ℓ_t on all rollouts; w_t = min(exp(Â_i/β), c) > 0.

    With `baseline=group`, Â_i = r_i − r̄, so a correct rollout weighs exp(1/β) times as much as an incorrect one of its
    prompt, and more the harder the prompt is; with `baseline=none`, Â_i = r_i (reward-weighted regression), which
    without the cap has RFT's gradient up to scale as β → 0. β → ∞ is SFT. No rollout is pushed down.

    Source: arXiv 1910.00177, where the baseline is a learned value function and the weights are capped as well;
    `baseline=none`: Peters and Schaal 2007. The learning rate is SFT's, as for all losses that weigh its tokens.

    Attributes:
        beta: β.
        cap: c, the largest weight.
        baseline: What is subtracted from the reward.
    """

    title = "AWR"
    summary = (
        "Advantage-weighted regression: imitates every rollout, those that are better than the average for their "
        "prompt more strongly."
    )
    paper = "arXiv 1910.00177"
    colour = "#e2b8b8"
    place = 2.5

    name: Literal["awr"]
    beta: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    cap: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    baseline: Literal["group", "none"] = "group"

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("positive", stops="π = 1")

    @property
    def any_reward(self) -> bool:
        """See `Loss.any_reward`."""
        return True

    @property
    def columns_from(self) -> Origin:
        """See `Loss.columns_from`."""
        return "group" if self.baseline == "group" else "row"

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Computes the column `advantage`, Â."""
        reward = rollouts["reward"].to_numpy(np.float64)
        if self.baseline == "none":
            return {"advantage": reward}
        return {"advantage": group_advantages(reward, rollouts["group"].to_numpy(), bias=0.0)}

    def terms(self, batch: Batch) -> Tensor:
        """Computes −min(exp(Â_i/β), c)·log π_t, shape (N, T)."""
        return -self.weights(batch) * batch.logps

    def weights(self, batch: Batch) -> Tensor:
        """Computes min(exp(Â_i/β), c), shape (N, T)."""
        exponent = batch.columns["advantage"].to(batch.logps.dtype) / self.beta
        return batch.over_tokens(exponent.exp().clamp(max=self.cap))
