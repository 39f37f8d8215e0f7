"""Trained weights, in memory and on disk: a LoRA adapter, or all weights of a base (full fine-tuning).

Everything outside this module treats the two alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from losslens.models.adapters import (
    LoraSettings,
    adapter_fingerprint,
    adapter_hashes,
    load_adapter,
    lora_changes,
    require_targets,
    save_adapter,
    with_adapter,
)
from losslens.models.full_model import (
    base_matrices,
    has_changed,
    is_model,
    is_trained_whole,
    matrix_changes,
    model_fingerprint,
    model_hashes,
    require_trainable,
    save_model,
    train_all_weights,
    with_base_weights,
    with_model,
)
from losslens.models.loading import ModelSource
from losslens.updates.lora_config import LoraConfigFile


def require_tunable(source: ModelSource, lora: LoraSettings | None) -> int:
    """Checks from a base's configuration, without its weights, that it can be trained.

    Args:
        source: The base.
        lora: Settings of the adapter; None for full fine-tuning.

    Returns:
        Number of weights to train.

    Raises:
        InputError: A target module does not exist or is not linear; or all weights are to be trained, and they are
            quantised.
    """
    return require_trainable(source) if lora is None else require_targets(source, lora)


def peft_config(model: Any, lora: LoraSettings | None) -> Any:
    """Returns PEFT's configuration of the adapter to train; without one, makes all weights of `model` trainable."""
    if lora is not None:
        return lora.peft_config(model)
    train_all_weights(model)
    return None


def load_start(model: Any, initial_adapter: Path | None) -> None:
    """Loads the initial adapter; full fine-tuning starts from the base's weights, which are in place."""
    if initial_adapter is not None:
        load_adapter(model, initial_adapter)


def causal_model(model: Any) -> Any:
    """Returns the causal language model that is trained: the one inside a PEFT model, or the model itself."""
    return model if is_trained_whole(model) else model.get_base_model()


def as_base(model: Any) -> AbstractContextManager[None]:
    """Makes a model in training compute what its base does, within the block."""
    whole = is_trained_whole(model)
    disabled: AbstractContextManager[None] = with_base_weights(model) if whole else model.disable_adapter()
    return disabled


def changes_weights(model: Any) -> bool:
    """Returns True if training has changed any weight: ΔW = s·B·A is 0 if every B is, as in the initial adapter."""
    if is_trained_whole(model):
        return has_changed(model)
    return any(bool(weight.any()) for name, weight in model.named_parameters() if ".lora_B." in name)


def update_norm(model: Any) -> float:
    """Computes ‖ΔW‖_F over all trained matrices of a model in training; NaN if a weight is not finite."""
    if is_trained_whole(model):
        return float(sum(change for _, change in matrix_changes(model)) ** 0.5)
    return float(sum(squared for _, squared in lora_changes(model)) ** 0.5)


def base_norm(model: Any) -> float:
    """Computes ‖W0‖_F over the matrices that `update_norm` counts; 0 if they are quantised."""
    if is_trained_whole(model):
        weights = base_matrices(model)
    else:
        weights = (module.get_base_layer().weight for module, _ in lora_changes(model))
    return float(sum(float(weight.detach().float().square().sum()) for weight in weights) ** 0.5)


def folder_of(model: Any) -> str:
    """Returns the name of the folder, in that of a run or snapshot, for the trained weights."""
    return "model" if is_trained_whole(model) else "adapter"


def save_weights(model: Any, folder: Path) -> None:
    """Writes the trained weights as files that depend on nothing else: a PEFT folder, or one of transformers."""
    (save_model if is_trained_whole(model) else save_adapter)(model, folder)


@contextmanager
def with_weights(base: Any, folder: Path) -> Iterator[Any]:
    """Yields the base with the trained weights in `folder`, for scoring; restores the base afterwards.

    Raises:
        InputError: The adapter is not plain LoRA, or the model is not of the base's architecture.
    """
    with (with_model if is_model(folder) else with_adapter)(base, folder) as model:
        yield model


def lora_rank(folder: Path) -> int | None:
    """Reads the largest rank of the adapter in `folder`; None if the folder holds a whole model.

    Raises:
        InputError: The adapter is not plain LoRA.
    """
    return None if is_model(folder) else LoraConfigFile(folder / "adapter_config.json").largest_rank


def weights_hashes(folder: Path) -> dict[str, str]:
    """Computes the SHA-256 of trained weights and of their configuration, by the names used in manifests.

    Raises:
        InputError: A file is missing.
    """
    return model_hashes(folder) if is_model(folder) else adapter_hashes(folder)


def weights_fingerprint(folder: Path) -> str:
    """Computes the SHA-256 of trained weights.

    Raises:
        InputError: A file with weights is missing.
    """
    return model_fingerprint(folder) if is_model(folder) else adapter_fingerprint(folder)
