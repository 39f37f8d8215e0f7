"""A loss outside the package."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from losslens.losses import Batch, Loss


class Half(Loss):
    """The negative log-likelihood, weighted."""

    title = "½ SFT"
    summary = "Half of supervised fine-tuning."
    colour = "#123456"
    conventional_lr_scale = 0.2

    name: Literal["half"]
    share: float = 0.5
    floor: float = 0.0

    def terms(self, batch: Batch) -> Tensor:
        return -(self.share + self.floor) * batch.logps
