"""Functions of the log-ratios of pairs to the base, and the base class of the losses that use them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from pydantic import Field

from losslens.losses import Batch, Factors, Need
from losslens.losses.pairs import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

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
        label_smoothing: ε of `exo_pair` and `robust`.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    beta: float
    label_smoothing: float = 0.0

    @classmethod
    def of(cls, batch: Batch, beta: float) -> Margins:
        """Returns those of a batch."""
        return cls(*batch.split_pairs(batch.log_ratio), *batch.split_pairs(batch.lengths), beta)

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


def ipo_summed(m: Margins) -> Tensor:
    """(h_w − h_l − 1/2β)², as printed in arXiv 2310.12036, eq. 17."""
    return (m.chosen - m.rejected - 1 / (2 * m.beta)) ** 2


def _ipo_summed_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = 2 * (1 / (2 * m.beta) - (m.chosen - m.rejected))
    return weight, -weight


def sigmoid_norm(m: Margins) -> Tensor:
    """−log σ(β(h_w/|y_w| − h_l/|y_l|)). Source: length-normalised DPO of arXiv 2411.15124 (β = 5)."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(m.beta * m.mean_difference)


def _sigmoid_norm_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = m.beta * (-m.beta * m.mean_difference).sigmoid()
    return weight / m.chosen_length, -weight / m.rejected_length


def nca_pair(m: Margins) -> Tensor:
    """−log σ(βh_w) − ½·log σ(−βh_w) − ½·log σ(−βh_l). Source: arXiv 2402.05369, eq. 11 for a pair."""
    from torch.nn.functional import logsigmoid

    chosen, rejected = m.beta * m.chosen, m.beta * m.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _nca_pair_weights(m: Margins) -> tuple[Tensor, Tensor]:
    chosen, rejected = m.beta * m.chosen, m.beta * m.rejected
    return (m.beta * ((-chosen).sigmoid() - 0.5 * chosen.sigmoid()), -0.5 * m.beta * rejected.sigmoid())


def bco_pair(m: Margins) -> Tensor:
    """−log σ(βh_w) − log σ(−βh_l). Source: arXiv 2404.04656 with its reward shift δ = 0, as in TRL."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(m.beta * m.chosen) - logsigmoid(-(m.beta * m.rejected))


def _bco_pair_weights(m: Margins) -> tuple[Tensor, Tensor]:
    return m.beta * (-m.beta * m.chosen).sigmoid(), -m.beta * (m.beta * m.rejected).sigmoid()


def exo_pair(m: Margins) -> Tensor:
    """KL of (σ(u), σ(−u)) to (1 − ε, ε). Source: arXiv 2402.00856, eq. 16 for a pair, with ε = 1e-3."""
    from torch.nn.functional import logsigmoid

    smoothing = m.u.new_tensor(m.label_smoothing)
    chosen = m.u.sigmoid() * (logsigmoid(m.u) - (-smoothing).log1p())
    return chosen + (-m.u).sigmoid() * (logsigmoid(-m.u) - smoothing.log())


def _exo_pair_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = m.beta * _slope(m.u) * (math.log((1 - m.label_smoothing) / m.label_smoothing) - m.u)
    return weight, -weight


def robust(m: Margins) -> Tensor:
    """[−(1 − ε)·log σ(u) + ε·log σ(−u)]/(1 − 2ε), which is −log σ(u) − ε/(1 − 2ε)·u: unbounded below.

    Source: arXiv 2403.00409, with ε = 0.1; TRL's `loss_type="robust"`.
    """
    from torch.nn.functional import logsigmoid

    flipped = -m.label_smoothing * logsigmoid(-m.u)
    return (-(1 - m.label_smoothing) * logsigmoid(m.u) - flipped) / (1 - 2 * m.label_smoothing)


def _robust_weights(m: Margins) -> tuple[Tensor, Tensor]:
    weight = m.beta * ((-m.u).sigmoid() + m.label_smoothing / (1 - 2 * m.label_smoothing))
    return weight, -weight


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
    return -logsigmoid(u) * (1 - share) + _exp_of_minus(u) * share


def _discopop_weights(m: Margins) -> tuple[Tensor, Tensor]:
    from torch.nn.functional import logsigmoid

    u = m.u
    share, turn = (u / _DISCOPOP_TAU).sigmoid(), _slope(u / _DISCOPOP_TAU) / _DISCOPOP_TAU
    logistic, exponential = -logsigmoid(u), _exp_of_minus(u)
    slope = turn * (exponential - logistic) - (1 - share) * (-u).sigmoid() - share * exponential
    return -m.beta * slope, m.beta * slope


def _exp_of_minus(u: Tensor) -> Tensor:
    """e^(−u), held where it would overflow in float32; there σ(u/τ), by which it is multiplied, is 0."""
    return (-u).clamp(max=80).exp()


def _slope(x: Tensor) -> Tensor:
    """σ′(x) = σ(x)(1 − σ(x))."""
    return x.sigmoid() * (-x).sigmoid()


class PairFunction(NamedTuple):
    """Function of the log-ratios of pairs.

    Attributes:
        terms: Computes the loss of each pair, shape (P,).
        weights: Computes −∂/∂h_w and −∂/∂h_l, the weights of the chosen and rejected rollouts' tokens, each of shape
            (P,).
        factors: See `Loss.factors`.
    """

    terms: Callable[[Margins], Tensor]
    weights: Callable[[Margins], tuple[Tensor, Tensor]]
    factors: Factors


_LOGISTIC = Factors("signed", saturation="logistic", stops="the margin is large", first_step="pair ±1")
_BUMP = Factors("signed", saturation="bump", stops="both are far from the base", first_step="pair ±1")
_REGRESSION = Factors("signed", saturation="regression", stops="the margin is 1/2β", first_step="pair ±1")

FUNCTIONS = {
    "sigmoid": PairFunction(sigmoid, _sigmoid_weights, _LOGISTIC),
    "hinge": PairFunction(hinge, _hinge_weights, replace(_LOGISTIC, saturation="band", stops="u = 1")),
    "ipo": PairFunction(ipo, _ipo_weights, replace(_REGRESSION, length="rollouts", first_step="pair ±1/|y|")),
    "ipo_summed": PairFunction(ipo_summed, _ipo_summed_weights, _REGRESSION),
    "nca_pair": PairFunction(
        nca_pair,
        _nca_pair_weights,
        replace(_LOGISTIC, stops="βh_w = ln 2 for the chosen, βh_l → −∞ for the rejected one"),
    ),
    "sppo_hard": PairFunction(sppo_hard, _sppo_hard_weights, replace(_REGRESSION, stops="h_w = 1/2β, h_l = −1/2β")),
    "apo_zero": PairFunction(apo_zero, _apo_zero_weights, _BUMP),
    "apo_down": PairFunction(
        apo_down, _apo_down_weights, replace(_BUMP, stops="both are far below the base", first_step="")
    ),
    "discopop": PairFunction(
        discopop, _discopop_weights, replace(_LOGISTIC, stops="u is at one of two minima", first_step="")
    ),
    "sigmoid_norm": PairFunction(
        sigmoid_norm, _sigmoid_norm_weights, replace(_LOGISTIC, length="rollouts", first_step="pair ±1/|y|")
    ),
    "bco_pair": PairFunction(bco_pair, _bco_pair_weights, replace(_LOGISTIC, stops="h_w and −h_l are large")),
    "exo_pair": PairFunction(exo_pair, _exo_pair_weights, replace(_BUMP, stops="u = ln((1 − ε)/ε)")),
    "robust": PairFunction(robust, _robust_weights, replace(_LOGISTIC, stops="never: the weight falls to a constant")),
}


class MarginLoss(PairLoss):
    """Base class of losses on pairs that compare log-ratios to the base."""

    diagnostic_titles: ClassVar[Mapping[str, str]] = {
        "rewards/margins": "Pairs: reward margin",
        "rewards/accuracies": "Pairs: share ranked correctly",
        "rewards/chosen": "Pairs: reward of the chosen",
        "rewards/rejected": "Pairs: reward of the rejected",
        "logps/chosen": "Pairs: log-probability of the chosen (nats)",
        "logps/rejected": "Pairs: log-probability of the rejected (nats)",
    }

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"reference"})

    def margins(self, batch: Batch) -> Margins:
        """Returns the log-ratios of a batch, with the loss's β."""
        raise NotImplementedError

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes TRL's metrics of pairs: `rewards` are β·h, `logps` are summed over the completion."""
        margins = self.margins(batch)
        chosen, rejected = batch.split_pairs(batch.logps.sum(dim=1))
        chosen_rewards, rejected_rewards = margins.beta * margins.chosen, margins.beta * margins.rejected
        return {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen.dtype),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }


class BetaLoss(MarginLoss):
    """Base class of losses on pairs whose log-ratios count β times, or are compared with 1/2β.

    Attributes:
        beta: β; the default is DPO's.
    """

    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    def margins(self, batch: Batch) -> Margins:
        """See `MarginLoss.margins`."""
        return Margins.of(batch, self.beta)
