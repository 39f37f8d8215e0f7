"""Full fine-tuning: all weights of the base, trained as copies beside it, and the folders that hold them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError, first_line
from losslens.core.hashing import hash_file, hash_folder
from losslens.models.loading import ModelSource, load_config, preserved, skeleton
from losslens.updates.weights import is_matrix

# torch and transformers are imported only where needed, so that a completed sweep does not wait for them.

# Attribute of a model under full fine-tuning: its `_Start`.
_START = "_full_finetuning_start"


@dataclass(frozen=True)
class _Start:
    """Start of full fine-tuning.

    Attributes:
        weights: (module, name, weight of the base) of each weight.
        config: The base's configuration, before a trainer edits it.
        generation_config: Likewise.
    """

    weights: list[tuple[Any, str, Any]]
    config: Any
    generation_config: Any


def require_trainable(source: ModelSource) -> int:
    """Refuses a base whose weights are quantised: they are no numbers that a gradient step could change.

    Returns:
        Number of weights of the base.

    Raises:
        InputError: They are quantised, or the model's configuration cannot be read.
    """
    settings = getattr(load_config(source).get_text_config(), "quantization_config", None)
    settings = settings or getattr(load_config(source), "quantization_config", None)
    if settings:
        kind = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        raise InputError(
            f"{source.field}={source.path}: its weights are quantised ({kind or 'unknown method'}), which adapter=none"
            " cannot train; use adapter=lora, or a base in 16 or 32 bits"
        )
    model = skeleton(source)
    model.tie_weights()  # a tied head counts once
    return sum(weight.numel() for weight in model.parameters())


def train_all_weights(model: Any) -> None:
    """Replaces the weights of `model` by trainable float32 copies; call it within `preserved`, which undoes it.

    Tied weights stay tied. The base's own weights stay in memory, for `as_base`: with AdamW, training takes 16 bytes a
    weight (float32 weight, gradient and two moments) beside them.
    """
    import torch

    copies: dict[int, Any] = {}
    base_weights = []
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if id(weight) not in copies:
                copies[id(weight)] = torch.nn.Parameter(weight.detach().to(torch.float32, copy=True))
            base_weights.append((module, name, weight))
            module._parameters[name] = copies[id(weight)]
    setattr(model, _START, _Start(base_weights, deepcopy(model.config), deepcopy(model.generation_config)))


def is_trained_whole(model: Any) -> bool:
    """Returns True if `train_all_weights` has prepared `model`."""
    return hasattr(model, _START)


def _start(model: Any) -> _Start:
    start: _Start = getattr(model, _START)
    return start


def matrix_changes(model: Any) -> Iterator[tuple[str, float]]:
    """Yields name and ‖ΔW‖_F² of each tensor of the modules that an analysis compares (`is_matrix`)."""
    names = {id(module): name for name, module in model.named_modules()}
    for module, name, weight in _start(model).weights:
        path = f"{names[id(module)]}.{name}"
        if is_matrix(path, weight.shape):
            change = module._parameters[name].detach() - weight.detach()
            yield path.removesuffix(".weight"), float(change.double().square().sum())


def base_matrices(model: Any) -> Iterator[Any]:
    """Yields the base's weight of each matrix that `matrix_changes` names."""
    names = {id(module): name for name, module in model.named_modules()}
    for module, name, weight in _start(model).weights:
        if is_matrix(f"{names[id(module)]}.{name}", weight.shape):
            yield weight


@contextmanager
def with_base_weights(model: Any) -> Iterator[None]:
    """Puts the base's weights in place of the trained ones within the block."""
    trained = [(module, name, module._parameters[name]) for module, name, _ in _start(model).weights]
    for module, name, weight in _start(model).weights:
        module._parameters[name] = weight
    try:
        yield
    finally:
        for module, name, weight in trained:
            module._parameters[name] = weight


def has_changed(model: Any) -> bool:
    """Returns True if full fine-tuning has changed any weight of `model`."""
    return any((module._parameters[name] != weight).any() for module, name, weight in _start(model).weights)


def save_model(model: Any, folder: Path) -> None:
    """Writes a folder of transformers: `config.json` and float32 safetensors, in shards if they are large."""
    start, edited = _start(model), (model.config, model.generation_config)
    model.config, model.generation_config = deepcopy(start.config), deepcopy(start.generation_config)
    try:
        model.save_pretrained(folder)
    finally:
        model.config, model.generation_config = edited


def write_model_between(folder: Path, before: Path, after: Path, weight: float) -> None:
    """Writes the model with the weights (1 − weight)·W_before + weight·W_after, in float32; the rest is `after`'s.

    Raises:
        InputError: A tensor of `after` is missing in `before`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    files = sorted(before.glob("model*.safetensors"))
    start = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for file in sorted(after.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
            continue
        tensors = {}
        for name, tensor in load_file(file).items():
            if name not in start:
                raise InputError(f"{before}: has no {name}, which {after} has")
            first, second = (each.to(torch.float64) for each in (start[name], tensor))
            tensors[name] = ((1 - weight) * first + weight * second).to(torch.float32)
        save_file(tensors, folder / file.name, metadata={"format": "pt"})


@contextmanager
def with_model(base: Any, folder: Path) -> Iterator[Any]:
    """Yields the base with the weights in `folder`, in the base's precision; restores the base afterwards.

    Raises:
        InputError: The folder cannot be read, or holds another architecture.
    """
    with between_models(base, [folder]) as (model, set_weights):
        set_weights([1.0])
        yield model


@contextmanager
def between_models(base: Any, folders: Sequence[Path]) -> Iterator[tuple[Any, Callable[[Sequence[float]], None]]]:
    """Yields the base with all weights moved along the straight paths to whole models; restores it afterwards.

    Args:
        base: The model W0.
        folders: The models W_i.

    Yields:
        The model, and a function that sets its weights to W0 + Σ w_i·(W_i − W0), computed in float32 or better and
        rounded to the base's precision; call it before the first forward pass.

    Raises:
        InputError: A folder cannot be read, or holds another architecture.
    """
    import torch

    own = dict(base.named_parameters(remove_duplicate=False))
    models = [_weights_in(base, folder) for folder in folders]

    @torch.no_grad()
    def set_weights(at: Sequence[float]) -> None:
        made: dict[int, Any] = {}
        for prefix, module in modules:
            for name in [name for name, weight in module._parameters.items() if weight is not None]:
                path = f"{prefix}.{name}" if prefix else name
                start = own[path]
                if id(start) not in made:
                    ends = [weights[path].to(start.device) for weights in models]
                    made[id(start)] = torch.nn.Parameter(_between(start, ends, at), requires_grad=False)
                module._parameters[name] = made[id(start)]

    with preserved(base):
        modules = list(base.named_modules(remove_duplicate=False))
        yield base.eval(), set_weights


def _between(start: Any, ends: Sequence[Any], at: Sequence[float]) -> Any:
    import torch

    if list(at) == [1.0]:
        return ends[0].to(start.dtype)
    dtype = torch.promote_types(start.dtype, torch.float32)
    moved = start.to(dtype)
    for end, weight in zip(ends, at, strict=True):
        moved = moved + weight * (end.to(dtype) - start.to(dtype))
    return moved.to(start.dtype)


def _weights_in(base: Any, folder: Path) -> dict[str, Any]:
    """Returns the weights in a folder by the names of the base's modules, in float32."""
    import torch

    try:
        # Read by transformers, which knows how each architecture names and ties its weights on the disk.
        loaded = type(base).from_pretrained(folder, dtype=torch.float32)
    except Exception as error:
        raise InputError(f"{folder}: {first_line(error)}") from error
    weights = dict(loaded.named_parameters(remove_duplicate=False))
    own = dict(base.named_parameters(remove_duplicate=False))
    for name in sorted(weights.keys() ^ own.keys()):
        raise InputError(f"{folder}: not a model of the base's architecture (only one of them has {name})")
    for name, weight in own.items():
        if weights[name].shape != weight.shape:
            raise InputError(f"{folder}: {name} has shape {tuple(weights[name].shape)}, not {tuple(weight.shape)}")
    return weights


def is_model(folder: Path) -> bool:
    """Returns True if a folder holds a whole model, in transformers' layout."""
    return (folder / "config.json").is_file()


def model_hashes(folder: Path) -> dict[str, str]:
    """Computes the SHA-256 of the weights and of the configuration of a model."""
    return {"adapter_sha256": model_fingerprint(folder), "adapter_config_sha256": hash_file(folder / "config.json")}


def model_fingerprint(folder: Path) -> str:
    """Computes the SHA-256 of a model's weights, in one file or in several with their index.

    Raises:
        InputError: There are no weights.
    """
    if not any(folder.glob("model*.safetensors")):
        raise InputError(f"{folder}: contains no model.safetensors")
    return hash_folder(folder, ("model*.safetensors", "model.safetensors.index.json"))
