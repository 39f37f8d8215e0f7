"""Direct preference optimisation on pairs of a correct and an incorrect rollout, and its variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from losslens.losses import Batch, Need
from losslens.losses.pairs import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal["sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]
_DISCOPOP_TAU = 0.05


@dataclass(frozen=True)
class Margins:
    """Arguments of the loss functions in this file; tensors of shape (P,).

    Attributes:
        chosen: h_w = log π_θ(y_w | x) − log π_ref(y_w | x), summed over the completion, nats.
        rejected: h_l, likewise.
        chosen_length: |y_w|, completion tokens, at least 1.
        rejected_length: |y_l|, likewise.
        beta: β.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    beta: float

    @property
    def u(self) -> Tensor:
        """β(h_w − h_l)."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def mean_difference(self) -> Tensor:
        """h_w/|y_w| − h_l/|y_l|."""
        return self.chosen / self.chosen_length - self.rejected / self.rejected_length


def sigmoid(m: Margins) -> Tensor:
    """−log σ(u). Source: arXiv 2305.18290, eq. 7."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(m.u)


def _sigmoid_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = m.beta * (-m.u).sigmoid()
    return weight, -weight


def hinge(m: Margins) -> Tensor:
    """max(0, 1 − u). Source: SLiC, arXiv 2305.10425, with DPO's margin as in arXiv 2309.06657."""
    return (1 - m.u).relu()


def _hinge_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = m.beta * (m.u < 1).to(m.u.dtype)
    return weight, -weight


def ipo(m: Margins) -> Tensor:
    """(h_w/|y_w| − h_l/|y_l| − 1/2β)², β being the source's τ.

    Source: arXiv 2310.12036, eq. 17, which does not divide by the lengths; TRL does, on its authors' advice.
    """
    return (m.mean_difference - 1 / (2 * m.beta)) ** 2


def _ipo_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = 2 * (1 / (2 * m.beta) - m.mean_difference)
    return weight / m.chosen_length, -weight / m.rejected_length


def nca_pair(m: Margins) -> Tensor:
    """−log σ(βh_w) − ½·log σ(−βh_w) − ½·log σ(−βh_l). Source: arXiv 2402.05369, eq. 11 for a pair."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = m.beta * m.chosen, m.beta * m.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _nca_pair_weights(m: Margins) -> tuple[Tensor, Tensor]:
    chosen, rejected = m.beta * m.chosen, m.beta * m.rejected
    return (m.beta * ((-chosen).sigmoid() - 0.5 * chosen.sigmoid()), -0.5 * m.beta * rejected.sigmoid())


def sppo_hard(m: Margins) -> Tensor:
    """(h_w − 1/2β)² + (h_l + 1/2β)². Source: arXiv 2405.00675, eq. 4.7, with probabilities 1 and 0 as in TRL."""
    return (m.chosen - 0.5 / m.beta) ** 2 + (m.rejected + 0.5 / m.beta) ** 2


def _sppo_hard_weights(m: Margins) -> tuple[Tensor, Tensor]:
    return 2 * (0.5 / m.beta - m.chosen), -2 * (0.5 / m.beta + m.rejected)


def apo_zero(m: Margins) -> Tensor:
    """1 − σ(βh_w) + σ(βh_l). Source: arXiv 2408.06266, eq. 7."""
    return 1 - (m.beta * m.chosen).sigmoid() + (m.beta * m.rejected).sigmoid()


def _apo_zero_weights(m: Margins) -> tuple[Tensor, Tensor]:
    return m.beta * _slope(m.beta * m.chosen), -m.beta * _slope(m.beta * m.rejected)


def apo_down(m: Margins) -> Tensor:
    """σ(βh_w) + 1 − σ(u): both fall, the rejected one faster. Source: arXiv 2408.06266, eq. 8."""
    return (m.beta * m.chosen).sigmoid() + (1 - m.u.sigmoid())


def _apo_down_weights(m: Margins) -> tuple[Tensor, Tensor]:
    return m.beta * (_slope(m.u) - _slope(m.beta * m.chosen)), -m.beta * _slope(m.u)


def discopop(m: Margins) -> Tensor:
    """(1 − s)·(−log σ(u)) + s·e^(−u) with s = σ(u/τ), τ = 0.05.

    At u = 0 its slope is +.78 where DPO's is −.5: it first lowers the margin, to a minimum at u = −.118.

    Source: arXiv 2406.08414, eq. 5.
    """
    from torch.nn.functional import logsigmoid

    u = m.u
    share = (u / _DISCOPOP_TAU).sigmoid()
    return -logsigmoid(u) * (1 - share) + (-u).exp() * share


def _discopop_weights(m: Margins) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import logsigmoid

    u = m.u
    share, turn = (u / _DISCOPOP_TAU).sigmoid(), _slope(u / _DISCOPOP_TAU) / _DISCOPOP_TAU
    logistic, exponential = -logsigmoid(u), (-u).exp()
    slope = turn * (exponential - logistic) - (1 - share) * (-u).sigmoid() - share * exponential
    return -m.beta * slope, m.beta * slope


def _slope(x: Tensor) -> Tensor:
    """σ′(x) = σ(x)(1 − σ(x))."""
    return x.sigmoid() * (-x).sigmoid()


# For each loss type: the terms, and the weights of the chosen and rejected rollouts' tokens, −∂/∂h_w and −∂/∂h_l.
_LOSS_TYPES: dict[LossType, tuple[Callable[[Margins], Tensor], Callable[[Margins], tuple[Tensor, Tensor]]]] = {
    "sigmoid": (sigmoid, _sigmoid_weights),
    "hinge": (hinge, _hinge_weights),
    "ipo": (ipo, _ipo_weights),
    "nca_pair": (nca_pair, _nca_pair_weights),
    "sppo_hard": (sppo_hard, _sppo_hard_weights),
    "apo_zero": (apo_zero, _apo_zero_weights),
    "apo_down": (apo_down, _apo_down_weights),
    "discopop": (discopop, _discopop_weights),
}


class Dpo(PairLoss):
    """−log σ(β[log π_θ(y_w)/π_ref(y_w) − log π_θ(y_l)/π_ref(y_l)]), the reference being the base.

    w_t = ±β·σ(−u), u = β(h_w − h_l). Source: arXiv 2305.18290, eq. 7.

    Attributes:
        beta: β.
        loss_type: `sigmoid` is DPO; the others are the functions in this file, under TRL's names.
    """

    title = "DPO"
    summary = (
        "Direct preference optimisation: learns from pairs of a correct and an incorrect rollout to prefer the correct "
        "one."
    )
    paper = "arXiv 2305.18290"
    colour = "#bd1f01"
    place = 6
    diagnostic_titles: ClassVar[Mapping[str, str]] = {
        "rewards/margins": "Pairs: reward margin",
        "rewards/accuracies": "Pairs: share ranked correctly",
        "rewards/chosen": "Pairs: reward of the chosen",
        "rewards/rejected": "Pairs: reward of the rejected",
        "logps/chosen": "Pairs: log-probability of the chosen (nats)",
        "logps/rejected": "Pairs: log-probability of the rejected (nats)",
    }

    name: Literal["dpo"]
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    loss_type: LossType = "sigmoid"

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"reference"})

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        return _LOSS_TYPES[self.loss_type][0](self._margins(batch))

    def weights(self, batch: Batch) -> Tensor:
        """Computes the weights of `loss_type`, shape (N, T)."""
        return batch.over_tokens_of_pairs(*_LOSS_TYPES[self.loss_type][1](self._margins(batch)))

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes TRL's metrics of pairs: `rewards` are β·h, `logps` are summed over the completion."""
        margins = self._margins(batch)
        chosen, rejected = batch.split_pairs(batch.logps.sum(dim=1))
        chosen_rewards, rejected_rewards = self.beta * margins.chosen, self.beta * margins.rejected
        return {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen.dtype),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }

    def _margins(self, batch: Batch) -> Margins:
        return Margins(*batch.split_pairs(batch.log_ratio), *batch.split_pairs(batch.lengths), self.beta)
