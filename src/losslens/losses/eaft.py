"""Entropy-adaptive fine-tuning: imitation of the tokens about which the model is uncertain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors, Loss, Need

if TYPE_CHECKING:
    from torch import Tensor


class Eaft(Loss):
    """sg((H_t/3)^α)·ℓ_t on all rollouts, where sg stops the gradient; w_t = (H_t/3)^α.

    H_t is the entropy in nats of the 20 most likely next tokens, renormalised; 3 ≈ ln 20 is its maximum. It is not the
    entropy over the whole vocabulary that every run logs.

    Source: arXiv 2601.02151; LLaMA-Factory's `use_eaft_loss`, whose learning rate is SFT's.

    Attributes:
        alpha: α; towards 0 the loss becomes SFT.
    """

    title = "EAFT"
    summary = (
        "Entropy-adaptive fine-tuning: imitates every rollout, but each token only as much as the model is uncertain "
        "about what comes next."
    )
    paper = "arXiv 2601.02151"
    colour = "#64643a"
    place = 4.6
    uses_reward = False

    name: Literal["eaft"]
    alpha: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("ignored", gate="entropy", stops="the entropy is 0")

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"top_entropy"})

    def terms(self, batch: Batch) -> Tensor:
        """Computes −(H_t/3)^α·log π_t, shape (N, T)."""
        return -self.weights(batch) * batch.logps

    def weights(self, batch: Batch) -> Tensor:
        """Computes (H_t/3)^α, shape (N, T)."""
        assert batch.top_entropy is not None
        return (batch.top_entropy / 3).detach() ** self.alpha
