"""Dynamic fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from losslens.methods import Pointwise, Scored

if TYPE_CHECKING:
    from torch import Tensor


def dft(scored: Scored) -> Tensor:
    """sg(π_t)·ℓ_t on all rollouts; sg stops the gradient.

    Without sg the gradient of −π·log π would reverse where π_t < 1/e: unlikely tokens would be pushed down.
    Source: arXiv 2508.05629; TRL's `loss_type="dft"`.

    Returns:
        Shape (N, T).
    """
    return -scored.logps * scored.logps.exp().detach()


class Dft(Pointwise):
    """`method=dft`."""

    name: Literal["dft"]

    @property
    def uses_reward(self) -> bool:
        """See `Method.uses_reward`."""
        return False

    def loss(self, scored: Scored) -> Tensor:
        """See `dft`."""
        return dft(scored)
