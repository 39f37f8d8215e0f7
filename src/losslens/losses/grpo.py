"""Offline GRPO: log-likelihood weighted by the advantage within the group of a prompt's rollouts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from losslens.config.identity import Formerly
from losslens.losses import Batch, Divisor, Factors, Need, Origin
from losslens.losses.ratio import RatioLoss

if TYPE_CHECKING:
    from torch import Tensor

BiasScope = Literal["all", "all_positive"]

# Where e^d of the KL term goes on as a straight line: in float32 it overflows at 88.7.
_HIGHEST_DIFFERENCE = 80.0


def group_advantages(
    reward: np.ndarray,
    group: np.ndarray,
    bias: float = 0.1,
    bias_scope: BiasScope = "all",
    std_norm: bool = False,
) -> np.ndarray:
    """Computes Â_i = r_i − mean of r in the group of i (+ b).

    Args:
        reward: Rewards, shape (n,).
        group: Group label of each rollout, shape (n,).
        bias: b. For a group whose rewards are all equal it is the whole advantage.
        bias_scope: `all` adds b to every rollout; `all_positive` only to groups in which every rollout is correct.
        std_norm: Divide r_i − mean by the group's (population) standard deviation, as in arXiv 2402.03300. Groups
            with zero standard deviation stay at 0.

    Source: arXiv 2402.03300, §4.1.2 (outcome supervision); b and the offline form: arXiv 2606.23740.

    Returns:
        Shape (n,).
    """
    reward = np.asarray(reward, dtype=np.float64)
    _, member = np.unique(group, return_inverse=True)
    size = np.bincount(member)
    mean = np.bincount(member, weights=reward) / size
    advantage = reward - mean[member]
    if std_norm:
        spread = np.sqrt(np.bincount(member, weights=advantage**2) / size)
        advantage = np.divide(advantage, spread[member], out=np.zeros_like(advantage), where=spread[member] > 1e-12)
    biased = np.ones(len(size)) if bias_scope == "all" else np.bincount(member, weights=reward <= 0) == 0
    shifted: np.ndarray = advantage + bias * biased[member]
    return shifted


class Grpo(RatioLoss):
    """Â_i·ℓ_t, plus `kl_coef` times an estimate of the KL divergence from the base.

    w_t = Â_i (with `weight_by=prob` Â_i·π_t, with a ratio as in `RatioLoss`) + β(e^d − 1), d = log π_ref − log π_θ,
    divided as `normaliser` says. With neither a ratio nor a KL term, terms with Â < 0 are unbounded below; the trainer
    logs the mean log-probability of incorrect rollouts.

    Source: arXiv 2606.23740; `weight_by=prob`: Krafton's offline GRPO; `ratio=clip`: arXiv 2402.03300, eq. 3, and with
    ε_high > ε_low DAPO, arXiv 2503.14476; `ratio=cispo`: arXiv 2506.13585.

    Attributes:
        bias: See `group_advantages`.
        bias_scope: See `group_advantages`.
        std_norm: See `group_advantages`.
        weight_by: `prob` replaces −Â_i·log π_t by −Â_i·π_t: DFT times the advantage. It excludes a ratio.
        kl_coef: β of β·(exp(d) − d − 1) per token: arXiv 2402.03300, eq. 4; on frozen rollouts, so it estimates the
            divergence under their distribution.
        epsilon_low: ε_low of `ratio=clip`.
        normaliser: Divisor of the sum. `tokens`: the completion tokens of the effective batch (DAPO); `sequence`: each
            rollout's tokens, then the rollouts, so that tokens of short rollouts weigh more (arXiv 2402.03300);
            `constant`: the rollouts times the length of the longest of all rollouts, whatever `train_on` leaves (Dr.
            GRPO, arXiv 2503.20783, which takes the longest allowed one).
    """

    title = "GRPO"
    summary = (
        "Group-relative policy optimisation, offline: raises the probability of rollouts that are better than the "
        "average for their prompt and lowers that of rollouts that are worse."
    )
    paper = "arXiv 2402.03300"
    colour = "#717581"
    place = 5

    name: Literal["grpo"]
    bias: float = Field(default=0.1, allow_inf_nan=False)
    bias_scope: BiasScope = "all"
    std_norm: bool = False
    weight_by: Annotated[Literal["logp", "prob"], Formerly("prob_weight", {"prob": True, "logp": False})] = "logp"
    kl_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    epsilon_low: float = Field(default=0.2, ge=0, lt=1)
    normaliser: Literal["tokens", "sequence", "constant"] = "tokens"

    @model_validator(mode="after")
    def _require_one_gate(self) -> Self:
        if self.weight_by == "prob" and self.ratio != "none":
            raise ValueError(f"weight_by=prob cannot be combined with ratio={self.ratio}")
        return self

    @property
    def inert(self) -> dict[str, str]:
        """See `Method.inert`."""
        return super().inert | ({} if self.bias else {"bias_scope": "bias=0 adds nothing anywhere"})

    @property
    def any_reward(self) -> bool:
        """See `Loss.any_reward`: advantages are differences of rewards, but `all_positive` asks which are correct."""
        return self.bias_scope == "all"

    @property
    def columns_from(self) -> Origin:
        """See `Loss.columns_from`."""
        return "table" if self.normaliser == "constant" else "group"

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        factors = Factors("relative", stops="never for a negative advantage")
        if self.weight_by == "prob":
            factors = replace(factors, gate="probability", saturation="taper", stops="π = 0 for a negative advantage")
        if self.normaliser == "sequence":
            factors = replace(factors, length="rollouts")
        elif self.weight_by == "logp" and not (self.bias or self.std_norm):
            factors = replace(factors, first_step="r − r̄")
        factors = self.with_ratio(factors)
        if self.kl_coef:
            # Each token by its ratio to the base, back to the base from either side.
            stops = "the divergence from the base balances the advantage"
            factors = replace(factors, gate="ratio", saturation="regression", stops=stops)
        return factors

    @property
    def divisor(self) -> Divisor:
        """See `Loss.divisor`."""
        return "tokens" if self.normaliser == "tokens" else "rollouts"

    @property
    def bounded(self) -> bool:
        """See `Loss.bounded`: probabilities and clipped ratios are bounded, log-probabilities without a KL are not."""
        return self.weight_by == "prob" or self.ratio != "none" or self.kl_coef > 0

    @property
    def lowest_ratio(self) -> float:
        """See `RatioLoss.lowest_ratio`."""
        return 1 - self.epsilon_low

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return super().needs | (frozenset({"reference"}) if self.kl_coef else frozenset())

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Computes `advantage` (`group_advantages`), and for `normaliser=constant` `longest`, the same in each row."""
        reward, group = rollouts["reward"].to_numpy(), rollouts["group"].to_numpy()
        columns = {"advantage": group_advantages(reward, group, self.bias, self.bias_scope, self.std_norm)}
        if self.normaliser == "constant":
            longest = max(rollouts["completion_ids"].map(len).max(), 1)
            columns["longest"] = np.full(len(rollouts), float(longest))
        return columns

    def multiplier(self, batch: Batch) -> Tensor:
        """Returns Â_i, shape (N, 1)."""
        return batch.columns["advantage"].to(batch.logps.dtype)[:, None]

    def terms(self, batch: Batch) -> Tensor:
        """Computes −Â_i·log π_t (or −Â_i·π_t, or its form with a ratio) plus the KL term, shape (N, T)."""
        loss = -self.multiplier(batch) * batch.logps.exp() if self.weight_by == "prob" else self.surrogate(batch)
        if self.kl_coef:
            assert batch.reference is not None
            difference = batch.reference - batch.logps
            loss = loss + self.kl_coef * (_exp(difference) - difference - 1)
        return self._normalised(loss, batch)

    def weights(self, batch: Batch) -> Tensor:
        """Computes Â_i (or Â_i·π_t, or that of the form with a ratio) + β(e^d − 1), shape (N, T)."""
        weights = self.surrogate_weights(batch)
        if self.weight_by == "prob":
            weights = weights * batch.logps.exp()
        if self.kl_coef:
            assert batch.reference is not None
            difference = (batch.reference - batch.logps).clamp(max=_HIGHEST_DIFFERENCE)
            weights = weights + self.kl_coef * (difference.exp() - 1)
        return self._normalised(weights, batch)

    def _normalised(self, values: Tensor, batch: Batch) -> Tensor:
        """Divides values of tokens by what `normaliser` says besides the rollouts, shape (N, T)."""
        if self.normaliser == "tokens":
            return values
        lengths = batch.lengths if self.normaliser == "sequence" else batch.columns["longest"].to(values.dtype)
        return values / lengths[:, None]


def _exp(difference: Tensor) -> Tensor:
    """e^d, and beyond d = 80 its tangent there, so that the KL term stays finite and goes on to grow."""
    beyond = (difference - _HIGHEST_DIFFERENCE).relu()
    return difference.clamp(max=_HIGHEST_DIFFERENCE).exp() * (1 + beyond)
