"""Measures the adapter that is being trained, at every logged step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from losslens import processes
from losslens.geometry.deltas import Delta, open_adapter
from losslens.geometry.live import LiveGeometry, Point

# In a checkpoint: the adapter as it was a logged step before, so that a run that goes on knows where it came from.
_BEFORE = "logged_before.safetensors"


class Geometry(TrainerCallback):
    """The geometry of the adapter that a model carries, for `Metrics`.

    Args:
        initial: Folder of the adapter that the run starts from.
        references: Folders of adapters on the same modules, by their labels.

    Raises:
        InputError: One of them cannot be read.
    """

    def __init__(self, initial: Path, references: Mapping[str, Path]) -> None:
        with ExitStack() as stack:
            start = stack.enter_context(open_adapter(initial))
            others = {label: stack.enter_context(open_adapter(folder)) for label, folder in references.items()}
            self.live = LiveGeometry(start, others, start.modules)

    def measure(self, model: Any) -> dict[str, float]:
        """The numbers by name (docs/metrics.md); none where a weight is not finite, which other callbacks tell."""
        now = point_of(model)
        finite = all(
            torch.from_numpy(factor).isfinite().all() for delta in now.values() for factor in (delta.b, delta.a)
        )
        return {f"geometry/{name}": value for name, value in self.live.measure(now).items()} if finite else {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _: TrainerControl, model: Any, **__: Any
    ) -> None:
        if not state.global_step:
            return
        # Checkpoints are made at logged steps: what is gone on from is the point measured last.
        now = point_of(model)
        self.live.before = [now]
        file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _BEFORE
        if file.exists():
            with safe_open(file, framework="numpy") as stored:
                self.live.before.append(
                    {
                        module: Delta(stored.get_tensor(f"{module}.B"), stored.get_tensor(f"{module}.A"), delta.scale)
                        for module, delta in now.items()
                    }
                )

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        if len(self.live.before) < 2 or not processes.is_main():
            return
        factors = {}
        for module, delta in self.live.before[1].items():
            factors[f"{module}.B"], factors[f"{module}.A"] = torch.from_numpy(delta.b), torch.from_numpy(delta.a)
        save_file(factors, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _BEFORE)


def point_of(model: Any) -> Point:
    """ΔW of each module that a PEFT model adapts, in float64, by the names that the adapter's folder has."""
    return {
        re.sub(r"^base_model\.model\.", "", name): Delta(
            module.lora_B["default"].weight.detach().cpu().to(torch.float64, copy=True).numpy(),
            module.lora_A["default"].weight.detach().cpu().to(torch.float64, copy=True).numpy(),
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
