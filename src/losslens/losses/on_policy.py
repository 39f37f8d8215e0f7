"""On-policy methods: each step samples completions of the training prompts from the policy of that step.

They are no `Loss`: there are no frozen rows, and TRL's trainers compute what is minimised
(`losslens.training.on_policy`). This module declares their options only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from losslens.config.identity import identity_options
from losslens.losses import Method


class OnPolicy(Method):
    """Base class of on-policy methods.

    Attributes:
        needs_teacher: True if the method compares the policy with `model.teacher`.
        temperature: Softmax temperature of the samples.
        max_tokens: Maximum length of a sample, tokens; None for `rollouts.max_tokens`.
        vllm: Sample with vLLM: `auto` if it is installed and the model is on CUDA, else with transformers.
    """

    own_samples: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    diagnostic_titles: ClassVar[Mapping[str, str]] = {
        "reward": "Share of correct samples",
        "mixed_groups": "Share of prompts with correct and incorrect samples",
        "completion_length": "Length of a sample (tokens)",
        "truncated": "Share of truncated samples",
    }

    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    vllm: Literal["auto", "off"] = "auto"

    @property
    def identity(self) -> dict[str, Any]:
        """See `Method.identity`: without `vllm`, which says how samples are computed and not what they are."""
        return {"version": self.version, **identity_options(self, ("vllm",))}

    @property
    def group_size(self) -> int:
        """Samples per prompt and step."""
        return 1
