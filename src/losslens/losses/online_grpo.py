"""Online GRPO, and DAPO as a recipe of it: policy gradient on fresh samples, with the group as baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from losslens.losses.on_policy import OnPolicy

# Options that only `recipe=dapo` uses.
_OF_DAPO = ("resamples", "overlong_share")


class OnlineGrpo(OnPolicy):
    """−min(ρ_t·Â_i, clip(ρ_t)·Â_i) on samples of the current policy, Â_i = (r_i − mean of the group)/(std + 1e-4).

    Each sample serves one update, so ρ_t = 1 and nothing is clipped: REINFORCE with a group baseline. `recipe=grpo`
    divides by the length of each sample, then by their number; `recipe=dapo` by the tokens of the batch, leaves
    truncated samples and groups with equal outcomes out of the loss, and punishes overlong samples.

    Source: arXiv 2402.03300 (GRPO), arXiv 2503.14476 (DAPO); TRL's `GRPOTrainer`.

    Attributes:
        scale_rewards: `group` divides the advantage by the group's (unbiased) standard deviation; `none` does not.
        kl_coef: β of the KL term to the base, β·(exp(d) − d − 1) per token, d = log π_ref − log π_θ.
        resamples: How often a step samples other prompts in place of groups with equal outcomes.
        overlong_share: Share of `max_tokens` over which the punishment of long samples grows from 0 to −1.
    """

    title = "Online GRPO"
    summary = (
        "Group-relative policy optimisation, on-policy: samples answers while it trains, and raises those that are "
        "better than the average for their prompt."
    )
    paper = "arXiv 2402.03300"
    colour = "#3f7f4f"
    place = 20
    removed = frozenset({"epsilon", "epsilon_high"})
    diagnostic_titles: ClassVar[Mapping[str, str]] = {
        **OnPolicy.diagnostic_titles,
        "rounds": "Rounds of sampling per step",
        "filtered_groups": "Share of groups left out of the loss",
    }

    name: Literal["online_grpo"]
    recipe: Literal["grpo", "dapo"] = "grpo"
    samples_per_prompt: int = Field(default=8, ge=2)
    scale_rewards: Literal["group", "none"] = "group"
    kl_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    resamples: int = Field(default=3, ge=0)
    overlong_share: float = Field(default=0.2, ge=0, le=1)

    @property
    def inert(self) -> dict[str, str]:
        """See `Method.inert`."""
        return {} if self.recipe == "dapo" else dict.fromkeys(_OF_DAPO, f"recipe={self.recipe} does not use it")

    @property
    def group_size(self) -> int:
        """See `OnPolicy.group_size`."""
        return self.samples_per_prompt
