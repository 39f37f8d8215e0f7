"""Reward-informed fine-tuning: lowers the probability of incorrect rollouts with a bounded loss."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from losslens.config.identity import Formerly
from losslens.losses import Batch, Factors, Loss

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["token", "sequence_mean", "affine", "naive"]


class Rift(Loss):
    """Negative log-likelihood for correct rollouts, probability for incorrect ones.

    With R = `reward_correct` for correct rollouts and `reward_incorrect` for incorrect ones, the term of token t is
    R·ℓ_t for R > 0 (w_t = R), and for R < 0

    - `token`: −R·π_t. w_t = R·π_t, a negative DFT term.
    - `sequence_mean`: −R·exp(mean_t log π_t), the same for each token, so that a rollout counts in proportion to its
      length, as in the other forms; w_t = R·exp(mean_t log π_t). The probability of the whole sequence, as in the
      source, is negligible beside the other terms (200 tokens at a mean of −0.3 nats give 9e-27), which would silently
      reduce the loss to RFT.
    - `naive`: R·ℓ_t, w_t = R, unbounded below.

    `affine` is arXiv 2606.23740's form for all rollouts, (1 − λR)·ℓ_t with λ = `affine_lambda`; that paper does not
    state λ.

    Source: arXiv 2601.09253 (rewards +1.0 and −0.2).
    """

    title = "RIFT"
    summary = "Reward-informed fine-tuning: imitates the correct rollouts and gently lowers the incorrect ones."
    paper = "arXiv 2601.09253"
    colour = "#832db6"
    place = 3

    name: Literal["rift"]
    form: Form = "token"
    reward_correct: Annotated[float, Formerly("reward_right")] = Field(default=1.0, gt=0, allow_inf_nan=False)
    reward_incorrect: Annotated[float, Formerly("reward_wrong")] = Field(default=-0.2, le=0, allow_inf_nan=False)
    affine_lambda: float = Field(default=0.5, allow_inf_nan=False)

    @property
    def inert(self) -> dict[str, str]:
        """See `Method.inert`."""
        if self.form != "affine":
            found = {"affine_lambda": f"form={self.form} has no λ"}
            return (
                found if self.reward_incorrect else found | {"form": "reward_incorrect=0 leaves no term that it forms"}
            )
        rewards = ("reward_correct", "reward_incorrect")
        return {} if self.affine_lambda else dict.fromkeys(rewards, "affine_lambda=0 multiplies it by 0")

    @property
    def bounded(self) -> bool:
        """See `Loss.bounded`."""
        if self.form == "affine":
            return max(self.affine_lambda * self.reward_correct, self.affine_lambda * self.reward_incorrect) <= 1
        return self.form != "naive" or self.reward_incorrect == 0

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        if self.form == "affine":
            if self.bounded:
                return Factors("positive", stops="π = 1")
            pushed = "correct" if self.affine_lambda > 0 else "incorrect"
            return Factors("signed", stops=f"never for {pushed} rollouts")
        if self.reward_incorrect == 0:
            return Factors("correct only", stops="π = 1", first_step="correct only")
        if self.form == "naive":
            return Factors("signed", stops="never for incorrect rollouts")
        factors = Factors("signed", saturation="taper", stops="π = 1 for correct rollouts, π = 0 for incorrect ones")
        return replace(factors, gate="probability") if self.form == "token" else factors

    def terms(self, batch: Batch) -> Tensor:
        """Computes the term of each token, shape (N, T)."""
        reward = self._reward(batch)
        if self.form == "affine":
            return -(1 - self.affine_lambda * reward) * batch.logps
        likelihood = -reward * batch.logps
        return likelihood if self.form == "naive" else likelihood.where(reward > 0, -reward * self._probability(batch))

    def weights(self, batch: Batch) -> Tensor:
        """Computes the weight of each token, shape (N, T)."""
        reward = self._reward(batch)
        if self.form == "affine":
            return (1 - self.affine_lambda * reward).expand_as(batch.logps)
        if self.form == "naive":
            return reward.expand_as(batch.logps)
        return (reward * self._probability(batch)).where(reward <= 0, reward)

    def _reward(self, batch: Batch) -> Tensor:
        """R, shape (N, 1)."""
        correct = batch.correct
        return (correct * self.reward_correct + ~correct * self.reward_incorrect).to(batch.logps.dtype)[:, None]

    def _probability(self, batch: Batch) -> Tensor:
        """π_t, shape (N, T), or its geometric mean over a rollout, shape (N, 1)."""
        if self.form == "token":
            return batch.logps.exp()
        return (batch.logps.sum(dim=1, keepdim=True) / batch.lengths[:, None]).exp()
