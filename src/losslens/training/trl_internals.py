"""Undocumented parts of TRL, used only here and, for on-policy methods, in `trl_on_policy`: check both each release.

`tests/test_trl_internals.py` compares the releases below with pyproject.toml, and checks that no other module uses
TRL's internals. A release is added once it trains byte-identical adapters to the previous one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trl
from trl import SFTTrainer
from trl.trainer import utils
from trl.trainer.utils import FusedCausalLMOutput

from losslens.core.errors import InputError

try:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
except ImportError:  # trl<1.16
    ChunkedDivergenceFunction = None

__all__ = [
    "HEAD", "TESTED", "ChunkedDivergenceFunction", "FusedCausalLMOutput", "OpenSFTTrainer", "has_fused_head",
    "require_on_policy",
]  # fmt: skip

# Supported minor releases, ascending. Earlier ones have no fused head. That of 1.15 needs Triton (`has_fused_head`);
# without it, as on the CPU, only models with a plain head can be trained.
TESTED = ("1.15", "1.16")
# Arguments of TRL's fused head, which `SFTTrainer` patches into the model, and of `lm_head`.
HEAD: Mapping[str, bool] = {"use_cache": False, "fused_lm_head": True}


class OpenSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, with its metrics accessible to subclasses that compute their own loss."""

    # Otherwise the loss is divided by the accumulation steps; the subclass normalises by the effective batch.
    loss_is_scaled_for_ga = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Otherwise the tokens of the effective batch are counted only for models whose forward accepts any keyword.
        self.model_accepts_loss_kwargs = True

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Does nothing: TRL would write a model card into each (temporary) checkpoint."""

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics of a step to those averaged until the next logged step."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def count_tokens(self, tokens: float) -> None:
        """Adds the tokens of a step to the run's total, logged as `num_tokens`."""
        self._total_train_tokens += tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


def require_on_policy() -> None:
    """Refuses on-policy methods with a release of TRL whose trainers lack what `trl_on_policy` uses.

    Raises:
        InputError: The release is older than 1.16.
    """
    if trl.__version__.startswith("1.15."):
        raise InputError(f"on-policy methods need trl>=1.16 (installed: {trl.__version__})")


def has_fused_head() -> bool:
    """Returns True if TRL's fused head is available: always since 1.16, before only with Triton."""
    return utils._ChunkedLogProbFunction is not None
