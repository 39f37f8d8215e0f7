"""Measures of the weight update during training, at every logged step: of an adapter, or of all weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from losslens.core import distributed
from losslens.measures.tables import layer_of
from losslens.measures.tracking import WeightTracker
from losslens.models.full_model import matrix_changes
from losslens.updates.folder import open_adapter
from losslens.updates.lora import updates_of

# File in a checkpoint: the adapter at the previous logged step, which a resumed run is compared with.
_PREVIOUS = "logged_before.safetensors"


def weight_tracking(initial: Path | None, references: Mapping[str, Path]) -> WeightTrackingCallback | NormCallback:
    """Returns the callback that measures the update of a run.

    Args:
        initial: Folder of the initial adapter; None for full fine-tuning.
        references: See `WeightTrackingCallback`; none for full fine-tuning.
    """
    return NormCallback() if initial is None else WeightTrackingCallback(initial, references)


class NormCallback(TrainerCallback):
    """Measures ‖ΔW‖_F under full fine-tuning, for `Metrics`: SVDs of all weights would take longer than the steps."""

    def measure(self, model: Any) -> dict[str, float]:
        """Returns `geometry/norm` and those of layers and projections; empty if a weight is not finite.

        Counts the matrices, but for embeddings and head, as the analysis does.
        """
        squared: dict[str, float] = {}
        for name, change in matrix_changes(model):
            projection = name.rpartition(".")[2]
            for part in ("", f"/layer_{layer_of(name)}", f"/{projection}"):
                squared[part] = squared.get(part, 0.0) + change
        finite = math.isfinite(squared[""])
        return {f"geometry/norm{part}": value**0.5 for part, value in squared.items()} if finite else {}


class WeightTrackingCallback(TrainerCallback):
    """Measures the update of the adapter under training, for `Metrics`.

    Args:
        initial: Folder of the initial adapter.
        references: Folders of reference adapters on the same modules, by label.

    Raises:
        InputError: An adapter cannot be read.
    """

    def __init__(self, initial: Path, references: Mapping[str, Path]) -> None:
        with ExitStack() as stack:
            start = stack.enter_context(open_adapter(initial))
            others = {label: stack.enter_context(open_adapter(folder)) for label, folder in references.items()}
            self.tracker = WeightTracker(start, others, start.modules)

    def measure(self, model: Any) -> dict[str, float]:
        """Returns the measures by name (docs/reference/metrics.md); empty if a weight is not finite."""
        now = updates_of(model)
        finite = all(np.isfinite(array).all() for update in now.values() for array in update.arrays().values())
        return {f"geometry/{name}": value for name, value in self.tracker.measure(now).items()} if finite else {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, _: TrainerControl, model: Any, **__: Any
    ) -> None:
        if not state.global_step:
            return
        # Checkpoints are written at logged steps, so the resumed adapter is the one measured last.
        now = updates_of(model)
        self.tracker.before = [now]
        file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _PREVIOUS
        if file.exists():
            stored = load_file(file)
            previous = {}
            for module, update in now.items():
                previous[module] = update.with_arrays({name: stored[f"{module}.{name}"] for name in update.arrays()})
            self.tracker.before.append(previous)

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        if len(self.tracker.before) < 2 or not distributed.is_main():
            return
        arrays = {
            f"{module}.{name}": array
            for module, update in self.tracker.before[1].items()
            for name, array in update.arrays().items()
        }
        save_file(arrays, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _PREVIOUS)
