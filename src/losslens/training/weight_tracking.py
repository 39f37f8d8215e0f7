"""Measures the adapter that is being trained, at every logged step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from losslens.core import distributed
from losslens.measures.tracking import WeightTracker
from losslens.updates.folder import open_adapter
from losslens.updates.lora import updates_of

# In a checkpoint: the adapter as it was a logged step before, so that a run that goes on knows where it came from.
_BEFORE = "logged_before.safetensors"


class WeightTrackingCallback(TrainerCallback):
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
            self.live = WeightTracker(start, others, start.modules)

    def measure(self, model: Any) -> dict[str, float]:
        """The numbers by name (docs/reference/metrics.md); none where a weight is not finite: other callbacks tell."""
        now = updates_of(model)
        finite = all(np.isfinite(array).all() for update in now.values() for array in update.arrays().values())
        return {f"geometry/{name}": value for name, value in self.live.measure(now).items()} if finite else {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _: TrainerControl, model: Any, **__: Any
    ) -> None:
        if not state.global_step:
            return
        # Checkpoints are made at logged steps: what is gone on from is the point measured last.
        now = updates_of(model)
        self.live.before = [now]
        file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _BEFORE
        if file.exists():
            stored = load_file(file)
            before = {}
            for module, update in now.items():
                before[module] = update.with_arrays({name: stored[f"{module}.{name}"] for name in update.arrays()})
            self.live.before.append(before)

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        if len(self.live.before) < 2 or not distributed.is_main():
            return
        arrays = {
            f"{module}.{name}": array
            for module, update in self.live.before[1].items()
            for name, array in update.arrays().items()
        }
        save_file(arrays, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _BEFORE)
