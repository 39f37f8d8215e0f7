"""Offline GRPO: log-likelihood weighted by the advantage within the group of a prompt's rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from losslens.methods import Pointwise, Scored

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
    """Â_i = r_i − mean of r in the group of i (+ b).

    Args:
        reward: Rewards, shape (n,).
        group: Which rollouts belong together, shape (n,).
        bias: b. A group whose rollouts all agree contributes nothing else.
        bias_scope: `all` adds b to every rollout; `all_positive` only to those of groups that are right throughout.
        std_norm: Whether r_i − mean is divided by the group's standard deviation (population), as in
            arXiv 2402.03300. Groups without spread stay at 0.

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
    if bias_scope == "all":
        return advantage + bias
    all_right = np.bincount(member, weights=reward <= 0) == 0
    return advantage + bias * all_right[member]


def grpo(scored: Scored, prob_weight: bool = False, kl_coef: float = 0.0) -> Tensor:
    """Â_i·ℓ_t, plus `kl_coef` times the KL term.

    Where Â < 0 the term is unbounded below; the trainer logs the mean log-probability of wrong rollouts.

    Args:
        scored: The batch.
        prob_weight: −Â_i·π_t instead; its gradient is −Â_i·sg(π_t)·∇log π_t, DFT times the advantage.
        kl_coef: β of β·(exp(d) − d − 1), d = log π_ref − log π_θ, per token: arXiv 2402.03300, eq. 4, here on frozen
            rollouts, so an estimate of the divergence on their distribution. Needs `reference_logps`.

    Source: arXiv 2606.23740; `prob_weight`: Krafton's offline GRPO.

    Returns:
        Shape (N, T).
    """
    advantage = scored.advantage.to(scored.logps.dtype)[:, None]
    mask = scored.mask.to(scored.logps.dtype)
    likelihood = scored.logps.exp() * mask if prob_weight else scored.logps
    loss = -advantage * likelihood
    if kl_coef:
        assert scored.reference_logps is not None
        difference = scored.reference_logps - scored.logps
        loss = loss + kl_coef * (difference.exp() - difference - 1) * mask
    return loss


class Grpo(Pointwise):
    """`method=grpo`; the options are those of `group_advantages` and `grpo`."""

    name: Literal["grpo"]
    bias: float = Field(default=0.1, allow_inf_nan=False)
    bias_scope: BiasScope = "all"
    std_norm: bool = False
    prob_weight: bool = False
    kl_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @property
    def needs_reference(self) -> bool:
        """See `Pointwise.needs_reference`."""
        return self.kl_coef > 0

    def advantages(self, reward: np.ndarray, group: np.ndarray) -> np.ndarray:
        """See `group_advantages`."""
        return group_advantages(reward, group, self.bias, self.bias_scope, self.std_norm)

    def loss(self, scored: Scored) -> Tensor:
        """See `grpo`."""
        return grpo(scored, self.prob_weight, self.kl_coef)
