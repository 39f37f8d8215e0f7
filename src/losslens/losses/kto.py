"""Kahneman-Tversky optimisation: single rollouts, desirable or undesirable, relative to a reference point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from losslens.losses import Batch, Divisor, Factors, Loss, Need

if TYPE_CHECKING:
    from torch import Tensor


class Kto(Loss):
    """λ_D·(1 − σ(β(h − z₀))) for a correct rollout, λ_U·(1 − σ(β(z₀ − h))) for an incorrect one.

    h = log π_θ(y | x) − log π_ref(y | x), the reference being the base; the reference point z₀ is the mean of
    log π_θ(y' | x)/π_ref(y' | x) over the prompts of the whole step, with completions y' of other prompts, clamped at
    0, and has no gradient. w_t = ±λ·β·σ′(β(h − z₀)): largest where h is near z₀, vanishing far from it.

    Source: arXiv 2402.01306, eq. 8; TRL's `KTOTrainer`, which estimates z₀ from one micro-batch. TRL's default learning
    rate is that of DPO, 1e-6.

    Attributes:
        beta: β.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.
        z0: `batch` is the estimate above; `zero` sets z₀ = 0, which needs no mismatched completions and is APO-zero
            (arXiv 2408.06266) rollout by rollout.
    """

    title = "KTO"
    summary = (
        "Kahneman-Tversky optimisation: raises correct rollouts and lowers incorrect ones, most strongly those whose "
        "log-ratio to the base is close to the average."
    )
    paper = "arXiv 2402.01306"
    colour = "#92dadd"
    place = 8
    unit = "rollout"
    conventional_lr_scale = 0.1
    diagnostic_titles: ClassVar[Mapping[str, str]] = {"kl": "KL estimate to the base: z₀ (nats)"}

    name: Literal["kto"]
    beta: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    desirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    z0: Literal["batch", "zero"] = "batch"

    @model_validator(mode="after")
    def _require_a_weight(self) -> Self:
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError("desirable_weight and undesirable_weight are both 0: nothing would be trained")
        return self

    @property
    def factors(self) -> Factors:
        """See `Loss.factors`."""
        if self.undesirable_weight == 0:
            return Factors("correct only", saturation="bump", stops="h is far from z₀", first_step="correct only")
        # At the base z₀ is 0, too.
        first_step = "±1" if self.desirable_weight == self.undesirable_weight else ""
        return Factors("signed", saturation="bump", stops="h is far from z₀", first_step=first_step)

    @property
    def divisor(self) -> Divisor:
        """See `Loss.divisor`."""
        return "rollouts"

    @property
    def needs(self) -> frozenset[Need]:
        """See `Loss.needs`."""
        return frozenset({"reference", "mismatched_log_ratio"} if self.z0 == "batch" else {"reference"})

    def terms(self, batch: Batch) -> Tensor:
        """Computes the loss of each rollout, shape (N,)."""
        return self._scale(batch) * (-self._distance(batch)).sigmoid()

    def weights(self, batch: Batch) -> Tensor:
        """Computes ±λ·β·σ(d)σ(−d), d the distance from z₀, shape (N, T)."""
        distance, sign = self._distance(batch), batch.correct.to(batch.logps.dtype) * 2 - 1
        return batch.over_tokens(self._scale(batch) * sign * self.beta * distance.sigmoid() * (-distance).sigmoid())

    def diagnostics(self, batch: Batch) -> dict[str, Tensor]:
        """Computes `kl`, which is z₀ in nats; none if it is fixed."""
        return {"kl": self._reference_point(batch)[None]} if self.z0 == "batch" else {}

    def _scale(self, batch: Batch) -> Tensor:
        correct = batch.correct
        return (correct * self.desirable_weight + ~correct * self.undesirable_weight).to(batch.logps.dtype)

    def _distance(self, batch: Batch) -> Tensor:
        """β(h − z₀) for a correct rollout, β(z₀ − h) for an incorrect one, shape (N,)."""
        distance = self.beta * (batch.log_ratio - self._reference_point(batch))
        return distance.where(batch.correct, -distance)

    def _reference_point(self, batch: Batch) -> Tensor:
        """z₀, shape ()."""
        if self.z0 == "zero":
            return batch.logps.new_zeros(())
        return batch.step["mismatched_log_ratio"].clamp(min=0)
