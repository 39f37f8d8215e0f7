"""LoRA adapters: their target modules, the initial adapter that all losses share, and their folders."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError, first_line
from losslens.core.files import atomic_folder, read_json, read_object, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.models.loading import ModelSource, preserved, skeleton
from losslens.updates.lora_config import LoraConfigFile

# torch and peft are imported only where needed, so that a completed sweep does not wait for them.


@dataclass(frozen=True)
class LoraSettings:
    """Settings of the adapter to train: rank, alpha, dropout and target modules.

    Attributes:
        target_modules: Names of linear modules, or `attention` (all linear modules of the attention blocks), or
            `all_linear` (all linear modules except the language-model head).
    """

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...] | str

    def peft_config(self, model: Any) -> Any:
        """Converts the settings to PEFT's `LoraConfig` for `model`.

        Raises:
            InputError: The model has no module with one of the names, or one that is not linear.
        """
        from peft import LoraConfig

        if self.target_modules == "attention":
            targets: list[str] | str = attention_modules(model)
        elif self.target_modules == "all_linear":
            targets = "all-linear"
        else:
            targets = list(self.target_modules)
            _require_linear(model, targets)
        return LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )


def _require_linear(model: Any, targets: list[str]) -> None:
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    for target in targets:
        matches = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not matches:
            head = model.get_output_embeddings()
            linear = [name for name, m in modules.items() if isinstance(m, (Linear, Conv1D)) and m is not head]
            names = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
            available = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise InputError(
                f"model.target_modules: no module is called {target}; the linear modules are {available or 'none'}"
            )
        for name in matches:
            if not isinstance(modules[name], (Linear, Conv1D)):
                kind = type(modules[name]).__name__
                raise InputError(
                    f"model.target_modules: {name} is not a linear module ({kind}); only linear modules can be adapted"
                )


def attention_modules(model: Any) -> list[str]:
    """Returns the names, for PEFT, of the linear modules inside the attention blocks of any architecture.

    An attention block is a module whose class name contains "attention" (`Qwen3Attention`, `GPT2Attention`, …). Names
    are paths from the block's parent, such as `self_attn.q_proj`: `c_proj` alone would also match GPT-2's MLP.

    Raises:
        InputError: The model has no such module.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    targets = set()
    for name, module in modules.items():
        if not isinstance(module, (Linear, Conv1D)):
            continue
        parts = name.split(".")
        for depth in range(1, len(parts)):
            if "attention" in type(modules[".".join(parts[:depth])]).__name__.lower():
                targets.add(".".join(parts[depth - 1 :]))
                break
    if not targets:
        raise InputError("model.target_modules=attention: no attention block with linear modules; name the modules")
    return sorted(targets)


@lru_cache(maxsize=32)
def require_targets(source: ModelSource, settings: LoraSettings) -> int:
    """Checks from the model's configuration, without its weights, that plain LoRA can adapt the target modules.

    Returns:
        Number of weights of the adapter.

    Raises:
        InputError: As for `initial_adapter`, or the model's configuration cannot be read.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        adapter = _with_lora(skeleton(source), settings)
    return sum(weight.numel() for weight in adapter.parameters() if weight.requires_grad)


def _with_lora(base: Any, settings: LoraSettings) -> Any:
    """Adds a new adapter to the base and checks that all adapted modules are linear.

    Raises:
        InputError: As for `initial_adapter`.
    """
    from peft import get_peft_model
    from peft.tuners import lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    option = "model.target_modules" + (
        "" if isinstance(settings.target_modules, tuple) else f"={settings.target_modules}"
    )
    try:
        with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):
            adapter = get_peft_model(base, settings.peft_config(base))
    except ValueError as error:
        raise InputError(f"{option}: {first_line(error)}") from error
    if isinstance(adapter.get_output_embeddings(), BaseTunerLayer):
        raise InputError("model.target_modules: the language-model head cannot be adapted")
    for name, module in adapter.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer) or isinstance(module, lora.Linear):
            continue
        name = name.replace(".base_layer", "")
        if isinstance(module, lora.ParamWrapper):
            raise InputError(
                f"{option}: {name}.{module.parameter_name} is a parameter (experts), which PEFT adapts with "
                "target_parameters; only linear modules can be adapted; name them or set model.target_modules=attention"
            )
        raise InputError(f"{option}: {name} is not a linear module ({type(module.get_base_layer()).__name__})")
    return adapter


def initial_adapter(
    output_dir: Path, base_identity: dict[str, str | None], base: Any, settings: LoraSettings, init_seed: int
) -> Path:
    """Returns the folder of the initial adapter for (base, LoRA settings, `init_seed`); creates it if missing.

    A is initialised by PEFT (Kaiming-uniform) after seeding torch with `init_seed`; B is 0. All runs load this one
    file, so A cannot differ between trainers. A depends on the base's precision, which is part of the key.

    Raises:
        InputError: The stored adapter is damaged, or a target module does not exist or is not linear.
    """
    import torch

    from losslens.core.locks import file_lock

    key = hash_json({"base": base_identity, "lora": settings, "init_seed": init_seed, "dtype": str(base.dtype)}, 12)
    folder = output_dir / "init" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.parent / f".{key}.lock"):
        if not folder.is_dir():
            with atomic_folder(folder) as temporary, preserved(base), torch.random.fork_rng():
                torch.manual_seed(init_seed)
                save_adapter(_with_lora(base, settings), temporary)
                write_json(
                    temporary / "manifest.json",
                    {**_initial_hashes(temporary), "init_seed": init_seed, "base": base_identity},
                    sealed=True,
                )
    require_intact_initial(folder)
    return folder


def require_intact_initial(folder: Path) -> None:
    """Checks an initial adapter against the hashes in its manifest.

    Raises:
        InputError: A file is missing or damaged.
    """
    try:
        recorded, actual = read_object(folder / "manifest.json"), _initial_hashes(folder)
    except InputError as error:
        raise InputError(f"{error}; the initial adapter is damaged; delete {folder} to recreate it") from error
    for name, value in actual.items():
        if recorded.get(name, value if name == "config_sha256" else None) != value:  # earlier ones have only `sha256`
            raise InputError(f"{folder}: the initial adapter is damaged; delete this folder to recreate it")


def _initial_hashes(folder: Path) -> dict[str, str]:
    hashes = adapter_hashes(folder)
    return {"sha256": hashes["adapter_sha256"], "config_sha256": hashes["adapter_config_sha256"]}


def load_adapter(model: Any, folder: Path) -> None:
    """Loads the weights of the adapter in `folder` into the adapter of `model`, bit by bit.

    Raises:
        InputError: The adapter does not fit the model.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    outcome = set_peft_model_state_dict(model, weights)
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if missing or outcome.unexpected_keys:
        raise InputError(f"{folder}: the adapter does not fit the base ({(missing + outcome.unexpected_keys)[0]})")


def lora_changes(model: Any) -> Iterator[tuple[Any, float]]:
    """Yields each adapted linear module of a model with an adapter, and ‖s·B·A‖_F², from products of rank r.

    ‖B·A‖_F² = ⟨BᵀB, AAᵀ⟩.
    """
    from peft.tuners import lora

    for module in model.modules():
        if isinstance(module, lora.Linear):
            for name in module.active_adapters:
                a, b = (part[name].weight.detach().double() for part in (module.lora_A, module.lora_B))
                yield module, module.scaling[name] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())


@contextmanager
def with_adapter(base: Any, folder: Path) -> Iterator[Any]:
    """Yields the base with the adapter in `folder`, for scoring; restores the base afterwards.

    Raises:
        InputError: The adapter is not plain LoRA.
    """
    from peft import PeftModel

    LoraConfigFile(folder / "adapter_config.json").require_names()
    with preserved(base):
        yield PeftModel.from_pretrained(base, folder).eval()


def save_adapter(model: Any, folder: Path) -> None:
    """Writes a plain PEFT folder whose files depend only on the adapter."""
    model.save_pretrained(folder)
    # PEFT stores the target modules as a set, whose order differs between processes.
    config = read_json(folder / "adapter_config.json")
    config["target_modules"] = sorted(config["target_modules"])
    write_json(folder / "adapter_config.json", config)


def adapter_hashes(folder: Path) -> dict[str, str]:
    """Computes the SHA-256 of an adapter's weights and of its configuration.

    Raises:
        InputError: One of the two files is missing.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        raise InputError(f"{config}: no such file")
    return {"adapter_sha256": adapter_fingerprint(folder), "adapter_config_sha256": hash_file(config)}


def adapter_fingerprint(folder: Path) -> str:
    """Computes the SHA-256 of an adapter's weights.

    Raises:
        InputError: The file with the weights is missing.
    """
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    return hash_file(file)
