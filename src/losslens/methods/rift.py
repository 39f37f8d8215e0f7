"""Reward-informed fine-tuning: wrong rollouts are pushed down by a loss that stays bounded."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from losslens.methods import Pointwise, Scored

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["token", "sequence_mean", "affine", "naive"]


def rift(
    scored: Scored,
    form: Form = "token",
    reward_right: float = 1.0,
    reward_wrong: float = -0.2,
    affine_lambda: float = 0.5,
) -> Tensor:
    """Right rollouts by their negative log-likelihood, wrong ones by their probability.

    With R = `reward_right` for right rollouts and `reward_wrong` for wrong ones, the term of token t is R·ℓ_t where
    R > 0, and where R < 0

    - `token`: −R·π_t. Its gradient is −R·sg(π_t)·∇log π_t, a negative DFT term.
    - `sequence_mean`: −R·exp(mean_t log π_t), the same for each token, so that a rollout counts by its length as in
      the other forms. The probability of the whole sequence, which the source writes, vanishes beside the other
      terms (200 tokens at a mean of −0.3 nats give 9e-27) and would silently leave RFT.
    - `naive`: R·ℓ_t, unbounded below.

    `affine` is arXiv 2606.23740's form for all rollouts, (1 − λR)·ℓ_t with λ = `affine_lambda`, which that paper does
    not give.

    Source: arXiv 2601.09253 (rewards +1.0 and −0.2).

    Returns:
        Shape (N, T).
    """
    right = scored.reward > 0
    reward = (right * reward_right + ~right * reward_wrong).to(scored.logps.dtype)[:, None]
    likelihood = -reward * scored.logps
    if form == "naive":
        return likelihood
    if form == "affine":
        return -(1 - affine_lambda * reward) * scored.logps
    mask = scored.mask.to(scored.logps.dtype)
    if form == "token":
        probability = scored.logps.exp()
    else:
        tokens = mask.sum(dim=1, keepdim=True).clamp(min=1)
        probability = ((scored.logps * mask).sum(dim=1, keepdim=True) / tokens).exp()
    return likelihood.where(reward > 0, -reward * probability * mask)


class Rift(Pointwise):
    """`method=rift`; the options are those of `rift`."""

    name: Literal["rift"]
    form: Form = "token"
    reward_right: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    reward_wrong: float = Field(default=-0.2, le=0, allow_inf_nan=False)
    affine_lambda: float = Field(default=0.5, allow_inf_nan=False)

    @model_validator(mode="after")
    def _warn_of_the_unbounded_form(self) -> Self:
        if self.form == "naive" and self.reward_wrong < 0:
            warnings.warn("method.form=naive is unbounded below: wrong rollouts can run away", stacklevel=2)
        if self.form == "affine" and self.affine_lambda * self.reward_right > 1:
            warnings.warn("method.form=affine is unbounded below where λ·R > 1: here for right rollouts", stacklevel=2)
        return self

    def loss(self, scored: Scored) -> Tensor:
        """See `rift`."""
        return rift(scored, self.form, self.reward_right, self.reward_wrong, self.affine_lambda)
