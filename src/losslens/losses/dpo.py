"""Direct preference optimisation on pairs of a correct and an incorrect rollout, and its variants."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors
from losslens.losses.margins import FUNCTIONS, BetaLoss, Margins

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal[
    "sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    "sigmoid_norm", "bco_pair", "exo_pair", "robust",
]  # fmt: skip
# Default ε of the loss types that have one.
_LABEL_SMOOTHING: dict[LossType, float] = {"exo_pair": 1e-3, "robust": 0.1}


class Dpo(BetaLoss):
    """−log σ(β[log π_θ(y_w)/π_ref(y_w) − log π_θ(y_l)/π_ref(y_l)]), the reference being the base.

    w_t = ±β·σ(−u), u = β(h_w − h_l). Source: arXiv 2305.18290, eq. 7.

    Attributes:
        loss_type: `sigmoid` is DPO; the others are functions in `losslens.losses.margins`, under TRL's names.
        label_smoothing: ε of `exo_pair` (1e-3 if None) and of `robust` (0.1 if None).
        ld_alpha: α of LD-DPO (arXiv 2409.06411): log-ratios of tokens beyond the length of the pair's shorter
            completion count α, and so do their weights. None counts all tokens equally.
    """

    title = "DPO"
    summary = (
        "Direct preference optimisation: learns from pairs of a correct and an incorrect rollout to prefer the correct "
        "one."
    )
    paper = "arXiv 2305.18290"
    colour = "#bd1f01"
    place = 6

    name: Literal["dpo"]
    loss_type: LossType = "sigmoid"
    label_smoothing: float | None = Field(default=None, gt=0, lt=0.5)
    ld_alpha: float | None = Field(default=None, ge=0, le=1)

    @property
    def inert(self) -> dict[str, str]:
        """See `Method.inert`."""
        found = {"ld_alpha": "1 is the whole rollout, as ld_alpha=null"} if self.ld_alpha == 1 else {}
        if self.loss_type not in _LABEL_SMOOTHING:
            return found | {"label_smoothing": f"loss_type={self.loss_type} has no label smoothing"}
        same = f"it is that of label_smoothing=null with loss_type={self.loss_type}"
        return found | ({"label_smoothing": same} if self.label_smoothing == _LABEL_SMOOTHING[self.loss_type] else {})

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        factors = FUNCTIONS[self.loss_type].factors
        return factors if self.ld_alpha in (None, 1) else replace(factors, gate="position", first_step="")

    @property
    def bounded(self) -> bool:
        """See `Loss.bounded`."""
        return self.loss_type != "robust"

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        return FUNCTIONS[self.loss_type].terms(self.margins(batch))

    def weights(self, batch: Batch) -> Tensor:
        """Computes the weights of `loss_type`, shape (N, T)."""
        weights = batch.over_tokens_of_pairs(*FUNCTIONS[self.loss_type].weights(self.margins(batch)))
        return weights if self.ld_alpha is None else weights.where(~_beyond_shorter(batch), self.ld_alpha * weights)

    def margins(self, batch: Batch) -> Margins:
        """See `BetaLoss.margins`; with `ld_alpha` the log-ratios are LD-DPO's."""
        found = super().margins(batch)
        if self.ld_alpha is not None:
            chosen, rejected = batch.split_pairs(self._desensitised_log_ratio(batch, self.ld_alpha))
            found = replace(found, chosen=chosen, rejected=rejected)
        smoothing = _LABEL_SMOOTHING.get(self.loss_type, 0.0) if self.label_smoothing is None else self.label_smoothing
        return replace(found, label_smoothing=smoothing)

    @staticmethod
    def _desensitised_log_ratio(batch: Batch, alpha: float) -> Tensor:
        """Log-ratio H with the tokens beyond the shorter completion counting α, shape (N,), nats."""
        assert batch.reference is not None
        beyond = _beyond_shorter(batch)

        def summed(logps: Tensor) -> Tensor:
            # In TRL's order of operations, so that results are bit-equal.
            return (logps * ~beyond).sum(dim=1) + alpha * (logps * beyond).sum(dim=1)

        return summed(batch.logps) - summed(batch.reference)


def _beyond_shorter(batch: Batch) -> Tensor:
    """True at positions beyond the length of the pair's shorter completion, shape (N, T), bool."""
    assert batch.pairs is not None
    lengths = batch.mask.sum(dim=1)
    shorter = lengths[batch.pairs].amin(dim=1, keepdim=True).expand_as(batch.pairs)
    return batch.mask.cumsum(dim=1) > lengths.index_put((batch.pairs,), shorter)[:, None]
