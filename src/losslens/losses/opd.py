"""On-policy distillation: reverse KL divergence to a teacher, on samples of the policy."""

from __future__ import annotations

from typing import Literal

from losslens.losses.on_policy import OnPolicy


class Opd(OnPolicy):
    """KL(π_θ ‖ q)_t over the whole vocabulary at each token of a sample of π_θ, divided by the tokens of the batch.

    q is `model.teacher`, which must have the base's vocabulary. Rewards are logged but not used.

    Source: arXiv 2306.13649 (β = 1, λ = 1); TRL's `DistillationTrainer`.
    """

    title = "OPD"
    summary = (
        "On-policy distillation: samples answers while it trains, and moves each token's distribution towards a "
        "teacher's."
    )
    paper = "arXiv 2306.13649"
    colour = "#8f5f9f"
    place = 21
    conventional_lr_scale = 0.05
    needs_teacher = True

    name: Literal["opd"]
