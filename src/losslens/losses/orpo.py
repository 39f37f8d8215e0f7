"""Odds ratio preference optimisation: likelihood of the chosen completion and odds of pairs, without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from losslens.losses import Batch, Factors
from losslens.losses.pairs import PairLoss

if TYPE_CHECKING:
    from torch import Tensor


class Orpo(PairLoss):
    """−m_w − λ·log σ(o), o = log[odds(e^{m_w})/odds(e^{m_l})], odds(p) = p/(1 − p), m = (1/|y|)·Σ_t log π_t.

    w_t = 1/|y_w| + λ·σ(−o)/(|y_w|(1 − e^{m_w})) for the chosen completion, −λ·σ(−o)/(|y_l|(1 − e^{m_l})) for the
    rejected one.

    Source: arXiv 2403.07691, eq. 4 and 7; TRL's `ORPOTrainer`, whose likelihood term also covers the prompt and is
    averaged over the tokens of a micro-batch. The odds of a completion of probability 1 are infinite: m is kept at
    least the machine epsilon below 0, and beyond it the odds have no gradient. The learning rate with
    `lr=conventional` is that of other losses on pairs: our choice, between TRL's 1e-6 (a twentieth) and SFT's.

    Attributes:
        odds_ratio_weight: λ (TRL's `beta`).
    """

    title = "ORPO"
    summary = (
        "Odds ratio preference optimisation: imitates the correct rollout of a pair and raises its odds over those of "
        "the incorrect one, without a reference model."
    )
    paper = "arXiv 2403.07691"
    colour = "#a890f0"
    place = 8.4

    name: Literal["orpo"]
    odds_ratio_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        if self.odds_ratio_weight == 0:
            return Factors("correct only", length="rollouts", stops="π_w = 1")
        return Factors("signed", saturation="logistic", length="rollouts", stops="π_w = 1")

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each pair, shape (P,)."""
        from torch.nn.functional import logsigmoid

        chosen, _ = batch.split_pairs(batch.logps.sum(dim=1) / batch.lengths)
        return -chosen - self.odds_ratio_weight * logsigmoid(self._log_odds_ratio(batch))

    def weights(self, batch: Batch) -> Tensor:
        """Computes ±λ·σ(−o)/(|y|(1 − e^m)), plus 1/|y_w| for the chosen completion, shape (N, T)."""
        pull = self.odds_ratio_weight * (-self._log_odds_ratio(batch)).sigmoid()
        means = _mean_logps(batch)
        inner = means == batch.logps.sum(dim=1) / batch.lengths
        # d log odds(e^m)/d log π_t, shape (N,).
        slopes = inner / (-means.expm1() * batch.lengths)
        (chosen, rejected), (length, _) = batch.split_pairs(slopes), batch.split_pairs(batch.lengths)
        return batch.over_tokens_of_pairs(1 / length + pull * chosen, -pull * rejected)

    @staticmethod
    def _log_odds_ratio(batch: Batch) -> Tensor:
        """Log of the odds of the chosen over those of the rejected completion, shape (P,)."""
        means = _mean_logps(batch)
        # log(1 − e^m) by expm1: 1 − e^m would cancel near m = 0.
        chosen, rejected = batch.split_pairs(means - (-means.expm1()).log())
        return chosen - rejected


def _mean_logps(batch: Batch) -> Tensor:
    """m, at most −ε of its dtype, shape (N,), nats."""
    from torch import finfo

    return (batch.logps.sum(dim=1) / batch.lengths).clamp(max=-finfo(batch.logps.dtype).eps)
