"""Offline GRPO: log-likelihood weighted by the advantage within the group of a prompt's rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from losslens.config.identity import Formerly
from losslens.losses import Batch, Loss, Need

if TYPE_CHECKING:
    from torch import Tensor

BiasScope = Literal["all", "all_positive"]


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


class Grpo(Loss):
    """Â_i·ℓ_t, plus `kl_coef` times an estimate of the KL divergence from the base.

    w_t = Â_i (with `weight_by=prob` Â_i·π_t) + β(e^d − 1), d = log π_ref − log π_θ. Terms with Â < 0 are unbounded
    below; the trainer logs the mean log-probability of incorrect rollouts.

    Source: arXiv 2606.23740; `weight_by=prob`: Krafton's offline GRPO.

    Attributes:
        bias: See `group_advantages`.
        bias_scope: See `group_advantages`.
        std_norm: See `group_advantages`.
        weight_by: `prob` replaces −Â_i·log π_t by −Â_i·π_t: DFT times the advantage.
        kl_coef: β of β·(exp(d) − d − 1) per token: arXiv 2402.03300, eq. 4; on frozen rollouts, so it estimates the
            divergence under their distribution.
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

    @property
    def bounded(self) -> bool:
        """See `Loss.bounded`: probabilities are bounded, log-probabilities are not."""
        return self.weight_by == "prob"

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"reference"}) if self.kl_coef else frozenset()

    def columns(self, rollouts: pd.DataFrame) -> dict[str, np.ndarray]:
        """Computes the column `advantage` (`group_advantages`)."""
        reward, group = rollouts["reward"].to_numpy(), rollouts["group"].to_numpy()
        return {"advantage": group_advantages(reward, group, self.bias, self.bias_scope, self.std_norm)}

    def terms(self, batch: Batch) -> Tensor:
        """Computes −Â_i·log π_t (or −Â_i·π_t) plus the KL term, shape (N, T)."""
        likelihood = batch.logps.exp() if self.weight_by == "prob" else batch.logps
        loss = -self._advantage(batch) * likelihood
        if self.kl_coef:
            assert batch.reference is not None
            difference = batch.reference - batch.logps
            loss = loss + self.kl_coef * (difference.exp() - difference - 1)
        return loss

    def weights(self, batch: Batch) -> Tensor:
        """Computes Â_i (or Â_i·π_t) + β(e^d − 1), shape (N, T)."""
        weights = self._advantage(batch).expand_as(batch.logps)
        if self.weight_by == "prob":
            weights = weights * batch.logps.exp()
        if self.kl_coef:
            assert batch.reference is not None
            weights = weights + self.kl_coef * ((batch.reference - batch.logps).exp() - 1)
        return weights

    def _advantage(self, batch: Batch) -> Tensor:
        return batch.columns["advantage"].to(batch.logps.dtype)[:, None]
