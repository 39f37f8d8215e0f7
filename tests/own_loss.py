"""A loss outside the package."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from losslens.methods import Pointwise, Scored


class Half(Pointwise):
    """The negative log-likelihood, weighted."""

    name: Literal["half"]
    share: float = 0.5
    floor: float = 0.0

    def loss(self, scored: Scored) -> Tensor:
        return -(self.share + self.floor) * scored.logps
