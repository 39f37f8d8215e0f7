"""Anchored supervised fine-tuning: dynamic fine-tuning that stays close to the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from losslens.losses import Batch, Factors, Loss, Need

if TYPE_CHECKING:
    from torch import Tensor


class Asft(Loss):
    """sg(π_t)·ℓ_t + λ·KL(π_ref ‖ π_θ)_t on all rollouts, where sg stops the gradient and the reference is the base.

    The KL divergence is exact, over the whole vocabulary at each completion position, so its gradient is not one of
    the sampled token's log-probability alone: with p = π_θ and q = π_ref over the vocabulary, the gradient of the term
    with respect to the logits is −π_t·(e_{y_t} − p) + λ·(p − q). `weights` and the logged weights are those of the
    first part, w_t = π_t. λ = 0 is DFT.

    Source: arXiv 2509.23753. The direction of the divergence and λ = 0.1 are those of the authors' `train.py` and of
    LLaMA-Factory's `use_asft_loss`, both with SFT's learning rate (2e-5). LLaMA-Factory averages within each
    micro-batch.

    Attributes:
        kl_coef: λ.
    """

    title = "ASFT"
    summary = (
        "Anchored supervised fine-tuning: imitates each token as much as the model already expects it, and keeps the "
        "model's predictions close to the base's."
    )
    paper = "arXiv 2509.23753"
    colour = "#e23ab8"
    place = 4.7
    uses_reward = False
    diagnostic_titles: ClassVar[Mapping[str, str]] = {"divergence": "KL divergence from the base (nats per token)"}

    name: Literal["asft"]
    kl_coef: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("ignored", gate="probability", stops="π = 1, held back by the divergence", first_step="π")

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"divergence"}) if self.kl_coef else frozenset()

    def terms(self, batch: Batch) -> Tensor:
        """Computes −sg(π_t)·log π_t + λ·KL_t, shape (N, T)."""
        likelihood = -batch.logps * batch.logps.exp().detach()
        if not self.kl_coef:
            return likelihood
        assert batch.divergence is not None
        return likelihood + self.kl_coef * batch.divergence

    def weights(self, batch: Batch) -> Tensor:
        """Computes π_t, without the gradient of the divergence, shape (N, T)."""
        return batch.logps.exp()

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes `divergence`, KL(π_ref ‖ π_θ) of each completion token, nats."""
        return {} if batch.divergence is None else {"divergence": batch.divergence[batch.mask]}
