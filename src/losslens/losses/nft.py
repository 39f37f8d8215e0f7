"""Negative-aware fine-tuning: maximum likelihood, of incorrect rollouts under the complement of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from losslens.losses import Batch, Factors
from losslens.losses.ratio import BehaviourLoss

if TYPE_CHECKING:
    from torch import Tensor

# The source's bounds of r̄ and log ρ.
_LOWEST_RATE, _HIGHEST_RATE, _HIGHEST_LOG_RATIO = 0.02, 0.98, 10.0


class Nft(BehaviourLoss):
    """−ω·log ρ_t for a correct rollout, −ω·λ·log max(q_t, ε) for an incorrect one, q_t = (1 − r̄·ρ_t)/(1 − r̄).

    ρ_t = π_t/μ_t is the ratio to the sampling policy and r̄ the share of correct rollouts of the prompt: if μ is the
    mixture of a policy of correct and one of incorrect rollouts, and π the former, then q·μ is the latter. The maximum
    passes the gradient straight through, so w_t = ω, or −ω·λ·r̄·ρ_t/((1 − r̄)·max(q_t, ε)); with `group_weight=dr_grpo`
    1 − r̄ and −λ·r̄·ρ_t/max(q_t, ε). At ρ = 1 that is offline GRPO without bias; as ρ → 0 an incorrect rollout no
    longer counts. r̄ is clipped to [0.02, 0.98], and tokens with log ρ_t > 10 have no gradient. Prompts whose rollouts
    are all correct or all incorrect have weight 0, as the source drops them.

    Source: arXiv 2505.18116; NVlabs/NFT `dp_actor.py` with `ratio_type=token`, which divides by 1000 per rollout in
    place of the tokens. Its learning rate is 1e-6, a fifth of arXiv 2606.23740's for SFT.

    Attributes:
        group_weight: ω. `none`: 1; `dr_grpo`: 1 − r̄; `grpo`: √((1 − r̄)/r̄). The source's `normalize` 0, 1, 2.
        epsilon: ε, the lower bound of q in the denominator of the gradient; the source's `clamp_negative`.
        negative_weight: λ; 0 leaves the correct rollouts.
        behaviour: See `BehaviourLoss`.
    """

    title = "NFT"
    summary = (
        "Negative-aware fine-tuning: imitates the correct rollouts, and lowers each token of the incorrect ones until "
        "it has become unlikely compared with the sampling policy."
    )
    paper = "arXiv 2505.18116"
    colour = "#106464"
    place = 5.2
    conventional_lr_scale = 0.2

    name: Literal["nft"]
    group_weight: Literal["none", "dr_grpo", "grpo"] = "dr_grpo"
    epsilon: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    negative_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def inert(self) -> dict[str, str]:
        """See `Method.inert`."""
        return {} if self.negative_weight else {"epsilon": "negative_weight=0 leaves no term that it bounds"}

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        if self.negative_weight == 0:
            return Factors("correct only", stops="π = 1")
        like_grpo = self.group_weight == "dr_grpo" and self.negative_weight == 1 and self.epsilon <= 1
        first_step = "r − r̄" if like_grpo and self.behaviour == "base" else ""
        return Factors("relative", "ratio", "taper", stops="ρ → 0 for incorrect rollouts", first_step=first_step)

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Computes the column `pass_rate`, the share of correct rollouts in the group of each."""
        correct = (rollouts["reward"] > 0).astype(np.float64)
        return {"pass_rate": correct.groupby(rollouts["group"]).transform("mean").to_numpy()}

    def terms(self, batch: Batch) -> Tensor:
        """Computes the term of each token, shape (N, T)."""
        log_ratio, rate = self._log_ratio(batch), self._rate(batch)
        share = (1 - rate * log_ratio.exp()) / (1 - rate)
        floor = share.detach().clamp(min=self.epsilon)
        # The value of log(floor), with the gradient of share/floor.
        passed = share / floor
        log_share = floor.log() + passed - passed.detach()
        terms = (-log_ratio).where(batch.correct[:, None], -self.negative_weight * log_share)
        return self._group_weight(batch) * terms

    def weights(self, batch: Batch) -> Tensor:
        """Computes ω, or −ω·λ·r̄·ρ_t/((1 − r̄)·max(q_t, ε)), shape (N, T)."""
        ratio, rate = self._log_ratio(batch).exp(), self._rate(batch)
        share = (1 - rate * ratio) / (1 - rate)
        down = -self.negative_weight * rate * ratio / ((1 - rate) * share.clamp(min=self.epsilon))
        weights = ratio.new_ones(ratio.shape).where(batch.correct[:, None], down)
        return self._group_weight(batch) * weights * (self.log_ratios(batch) <= _HIGHEST_LOG_RATIO)

    def _log_ratio(self, batch: Batch) -> Tensor:
        """The clipped log ρ_t, shape (N, T)."""
        return self.log_ratios(batch).clamp(max=_HIGHEST_LOG_RATIO)

    def _rate(self, batch: Batch) -> Tensor:
        """The clipped r̄, shape (N, 1)."""
        rate = batch.columns["pass_rate"].to(batch.logps.dtype)[:, None]
        return rate.clamp(_LOWEST_RATE, _HIGHEST_RATE)

    def _group_weight(self, batch: Batch) -> Tensor:
        """ω, and 0 for prompts without both outcomes, shape (N, 1)."""
        rate = self._rate(batch)
        weight = {"none": rate**0, "dr_grpo": 1 - rate, "grpo": ((1 - rate) / rate).sqrt()}[self.group_weight]
        given = batch.columns["pass_rate"][:, None]
        return weight * ((given > 0) & (given < 1))
