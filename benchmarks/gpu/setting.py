"""What is measured on: the device, and the sizes, which are those of Qwen3-4B on a GPU and small elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from losslens.config.training import Optim
from losslens.models.adapters import LoraSettings
from losslens.models.loading import LoadedModel, ModelSource, load_model

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")


@dataclass(frozen=True)
class Setting:
    """The device and the sizes.

    Attributes:
        device: Type of the device, `cuda` or `cpu`.
        changes: Values of Qwen3-4B's configuration that are replaced.
        layers: Layers of the model.
        rank: Rank of the adapter.
        matmul: Side of the matrices whose product is timed.
        lengths: Tokens of every row by name; None for log-normal lengths.
        rows: Rows of a step, by the same names.
        log_normal: Mean of the log-normal lengths before they are cut, and the longest, in tokens.
        new_tokens: Tokens to generate, and sequences at once.
    """

    device: str
    changes: dict[str, Any] = field(default_factory=dict)
    layers: int = 36
    rank: int = 32
    matmul: int = 8192
    lengths: dict[str, int | None] = field(default_factory=lambda: {"log-normal": None, "4096": 4096, "1024": 1024})
    rows: dict[str, int] = field(default_factory=lambda: {"log-normal": 16, "4096": 8, "1024": 16})
    log_normal: tuple[int, int] = (1400, 4096)
    new_tokens: tuple[int, int] = (128, 32)

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which speed is measured: bfloat16 on a GPU, float32 elsewhere."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def name(self) -> str:
        """Name of the card, or `CPU`."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "CPU"


def full() -> Setting:
    """Returns the setting of a GPU: Qwen3-4B's shapes."""
    return Setting("cuda")


def small(device: str) -> Setting:
    """Returns the setting that runs everything on little, in under two minutes on a CPU."""
    shape = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    return Setting(
        device, shape, layers=2, rank=4, matmul=512,
        lengths={"log-normal": None, "256": 256, "64": 64}, rows={"log-normal": 8, "256": 4, "64": 8},
        log_normal=(88, 256), new_tokens=(16, 4),
    )  # fmt: skip


def synchronise(setting: Setting) -> None:
    """Waits until the device has done what it was given."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


def student(device: str, dtype: str) -> LoadedModel:
    """Loads the embedded student."""
    from benchmarks.full_size import ROOT

    path = str(ROOT / "src" / "losslens" / "tiny" / "student")
    source = ModelSource("model", path, None, dtype, device, trust_remote_code=False)
    return load_model.__wrapped__(source)


def lora(rank: int) -> LoraSettings:
    """Returns the settings of an adapter of the attention projections, without dropout."""
    return LoraSettings(rank, 2.0 * rank, 0.0, ATTENTION)


def optim(batch_size: int, steps: int, **changes: Any) -> Optim:
    """Returns an optimiser at a constant rate that does not clip gradients, with some settings replaced."""
    settings: dict[str, Any] = {
        "max_steps": steps, "epochs": None, "batch_size": batch_size, "micro_batch": "auto", "scheduler": "constant",
        "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1e9, "gradient_checkpointing": "auto",
        "log_steps": 1, "save_steps": 1000, "snapshot_steps": None,
    }  # fmt: skip
    return Optim(**(settings | changes))
