"""Dynamic fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from losslens.losses import Batch, Factors, Loss

if TYPE_CHECKING:
    from torch import Tensor


class Dft(Loss):
    """sg(π_t)·ℓ_t on all rollouts, where sg stops the gradient; w_t = π_t.

    Without sg the gradient of −π·log π would reverse where π_t < 1/e: unlikely tokens would be pushed down.

    Source: arXiv 2508.05629; TRL's `loss_type="dft"`.
    """

    title = "DFT"
    summary = (
        "Dynamic fine-tuning: imitates every rollout, but each token only as much as the model already expects it."
    )
    paper = "arXiv 2508.05629"
    colour = "#a96b59"
    place = 4
    uses_reward = False

    name: Literal["dft"]

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        return Factors("ignored", gate="probability", stops="π = 1", first_step="π")

    def terms(self, batch: Batch) -> Tensor:
        """Computes −sg(π_t)·log π_t, shape (N, T)."""
        return -batch.logps * batch.logps.exp().detach()

    def weights(self, batch: Batch) -> Tensor:
        """Computes π_t, shape (N, T)."""
        return batch.logps.exp()
