"""Tapered off-policy REINFORCE: incorrect rollouts count the less, the less likely they have become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from losslens.config.identity import Formerly
from losslens.losses import Batch, Factors
from losslens.losses.ratio import BehaviourLoss

if TYPE_CHECKING:
    from torch import Tensor


class Topr(BehaviourLoss):
    """ℓ_t for a correct rollout, −sg(min(e^h, 1))·ℓ_t for an incorrect one, where sg stops the gradient.

    h = log π_θ(y | x) − log μ(y | x) of the whole completion, μ being the sampling policy; w_t = 1 or −min(e^h, 1):
    an incorrect rollout is pushed down as long as it is about as likely as it was, and no longer when it has become
    unlikely. Over a long completion e^h falls to 0 with a small change per token, which turns the loss into RFT: the
    mean of min(e^h, 1) over incorrect rollouts is logged, and `level=geometric` takes the mean per token, h/|y|.

    Source: arXiv 2503.14286, the gradient with rewards 1 and −1 and the sequence ratio. The learning rate, a fifth of
    SFT's, is our choice: that of NFT and REDI, which push down incorrect rollouts as well.

    Attributes:
        level: Whether the ratio is that of the completion (`sequence`) or its geometric mean per token (`geometric`).
        behaviour: See `BehaviourLoss`.
    """

    title = "TOPR"
    summary = (
        "Tapered off-policy REINFORCE: imitates the correct rollouts and lowers the incorrect ones, the less the "
        "unlikelier they have become since they were sampled."
    )
    paper = "arXiv 2503.14286"
    colour = "#643a3a"
    place = 5.4
    conventional_lr_scale = 0.2
    diagnostic_titles: ClassVar[Mapping[str, str]] = {"taper/incorrect": "Incorrect rollouts: mean of the taper"}

    name: Literal["topr"]
    level: Annotated[Literal["sequence", "geometric"], Formerly("ratio")] = "sequence"

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        first_step = "±1" if self.behaviour == "base" else ""
        return Factors("signed", saturation="taper", stops="h → −∞ for incorrect rollouts", first_step=first_step)

    def terms(self, batch: Batch) -> Tensor:
        """Computes −w_t·log π_t, shape (N, T)."""
        return -self.weights(batch) * batch.logps

    def weights(self, batch: Batch) -> Tensor:
        """Computes 1 or −min(e^h, 1), without gradient, shape (N, T)."""
        taper = self._taper(batch)
        return batch.over_tokens(taper.new_ones(taper.shape).where(batch.correct, -taper))

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes `taper/incorrect`, min(e^h, 1) of each incorrect rollout."""
        return {"taper/incorrect": self._taper(batch)[~batch.correct]}

    def _taper(self, batch: Batch) -> Tensor:
        """min(e^h, 1), without gradient, shape (N,)."""
        log_ratio = self.log_ratios(batch).detach().sum(dim=1)
        if self.level == "geometric":
            log_ratio = log_ratio / batch.lengths
        return log_ratio.clamp(max=0).exp()
