"""Losses that divide by the probabilities of the policy that sampled the rollouts, and the clipped ratios of PPO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from losslens.losses import Batch, Factors, Loss, Need

if TYPE_CHECKING:
    from torch import Tensor

Behaviour = Literal["sampler", "sampler_raw", "base"]

# Bound of log ρ of `clip`: e^20 is 4.9e8, and beyond 88.7 ρ overflows in float32.
_HIGHEST_LOG_RATIO = 20.0


class BehaviourLoss(Loss):
    """Base class of losses that use ρ_t = π_t/μ_t, μ being the policy that sampled the rollouts.

    Attributes:
        behaviour: μ. `sampler`: as recorded, with the temperature and truncation it sampled with; `sampler_raw`: as
            recorded, at temperature 1 and without truncation; `base`: the base in place of the sampler, so that ρ = 1
            at the first step. The last is an approximation unless the rollouts are the base's own at temperature 1,
            and is never used unless chosen.
    """

    behaviour: Behaviour = "sampler"

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"reference" if self.behaviour == "base" else self.behaviour})

    def log_ratios(self, batch: Batch) -> Tensor:
        """Computes log ρ_t = log π_t − log μ_t, shape (N, T), nats."""
        behaviour = batch.reference if self.behaviour == "base" else batch.sampler
        assert behaviour is not None
        return batch.logps - behaviour


class RatioLoss(BehaviourLoss):
    """Base class of losses −A·log π_t that can replace the log-likelihood by a clipped ratio ρ_t = π_t/μ_t.

    A is a number per rollout. With `ratio`

    - `none`: −A·log π_t; w_t = A.
    - `clip`: −min(A·ρ_t, A·clip(ρ_t, 1 − ε_low, 1 + ε_high)), the surrogate of PPO (arXiv 1707.06347, eq. 7);
      w_t = A·ρ_t, but 0 where ρ_t > 1 + ε_high with A > 0 and where ρ_t < 1 − ε_low with A < 0. Bounded below.
      Where log ρ_t > 20 the ratio is held at e^20, without gradient, so that it cannot overflow.
    - `cispo`: −sg(min(ρ_t, c))·A·log π_t (arXiv 2506.13585, with the upper bound only); w_t = A·min(ρ_t, c):
      no token's gradient is cut, and that of tokens with A < 0 vanishes as ρ_t → 0.

    On frozen rollouts, clipping stops early: a token that has left the band no longer counts.

    Attributes:
        ratio: Form of the term: `none`, `clip` or `cispo`.
        epsilon_high: ε_high of `clip`.
        ratio_max: c of `cispo`, an absolute value as in TRL (there `epsilon_high`), not 1 + ε.
        behaviour: μ of the ratio. `sampler`: as recorded; `sampler_raw`: as recorded at temperature 1; `base`: the base
            in its place.
    """

    diagnostic_titles: ClassVar[Mapping[str, str]] = {"ratio/clipped": "Ratio to the sampler: share of clipped tokens"}

    ratio: Literal["none", "clip", "cispo"] = "none"
    epsilon_high: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    ratio_max: float = Field(default=5.0, gt=0, allow_inf_nan=False)

    @property
    def inert(self) -> dict[str, str]:
        """See `Method.inert`."""
        used = {"none": (), "clip": ("epsilon_low", "epsilon_high", "behaviour"), "cispo": ("ratio_max", "behaviour")}
        options = [name for name in ("epsilon_low", "epsilon_high", "ratio_max", "behaviour") if name in self.options]
        return {name: f"ratio={self.ratio} does not use it" for name in options if name not in used[self.ratio]}

    @property
    def lowest_ratio(self) -> float:
        """1 − ε_low of `clip`, which matters for A < 0 only."""
        return 0.0

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`; empty without a ratio."""
        return frozenset() if self.ratio == "none" else super().needs

    def with_ratio(self, factors: Factors) -> Factors:
        """Returns the factors of the loss without a ratio as changed by `ratio`."""
        if self.ratio == "none":
            return factors
        first_step = factors.first_step if self.behaviour == "base" else ""
        if self.ratio == "clip":
            return replace(factors, gate="ratio", saturation="band", stops="ρ leaves the band", first_step=first_step)
        if factors.outcome in ("signed", "relative"):
            factors = replace(factors, saturation="taper", stops="ρ → 0 for a negative advantage")
        return replace(factors, gate="ratio", first_step=first_step)

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes `ratio/clipped`: 1 for each clipped token, otherwise 0; none without a ratio."""
        if self.ratio == "none":
            return {}
        clipped = self._clipped(batch)[batch.mask]
        return {"ratio/clipped": clipped.to(batch.logps.dtype)}

    def multiplier(self, batch: Batch) -> Tensor:
        """Returns A of each rollout, shape (N, 1)."""
        raise NotImplementedError

    def surrogate(self, batch: Batch) -> Tensor:
        """Computes the term of each token as chosen by `ratio`, shape (N, T)."""
        multiplier = self.multiplier(batch)
        if self.ratio == "none":
            return -multiplier * batch.logps
        ratio = self._ratio(batch)
        if self.ratio == "cispo":
            return -ratio.clamp(max=self.ratio_max).detach() * multiplier * batch.logps
        clipped = ratio.clamp(self.lowest_ratio, 1 + self.epsilon_high)
        return -(multiplier * ratio).minimum(multiplier * clipped)

    def surrogate_weights(self, batch: Batch) -> Tensor:
        """Computes w_t of `surrogate`, shape (N, T)."""
        multiplier = self.multiplier(batch)
        if self.ratio == "none":
            return multiplier.expand_as(batch.logps)
        ratio = self._ratio(batch)
        if self.ratio == "cispo":
            return multiplier * ratio.clamp(max=self.ratio_max)
        return (multiplier * ratio).where(~self._clipped(batch), 0)

    def _ratio(self, batch: Batch) -> Tensor:
        """ρ_t, for `clip` at most e^20, shape (N, T)."""
        log_ratios = self.log_ratios(batch)
        return (log_ratios.clamp(max=_HIGHEST_LOG_RATIO) if self.ratio == "clip" else log_ratios).exp()

    def _clipped(self, batch: Batch) -> Tensor:
        """True where the ratio is replaced by its bound, shape (N, T), bool."""
        multiplier, ratio = self.multiplier(batch), self._ratio(batch)
        if self.ratio == "cispo":
            return (ratio > self.ratio_max) & (multiplier != 0)
        above, below = ratio > 1 + self.epsilon_high, ratio < self.lowest_ratio
        held = (self.log_ratios(batch) > _HIGHEST_LOG_RATIO) & (multiplier != 0)
        return (above & (multiplier > 0)) | (below & (multiplier < 0)) | held
