"""Reads the update of one module after another from a PEFT LoRA folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from losslens.errors import InputError, first_line
from losslens.geometry.tensor_file import TensorFile

_SHARD = re.compile(r"^adapter_model-(\d+)-of-(\d+)\.safetensors$")
# Initialisations that take a part out of the base's weights: the base alone is then not what the update is added to.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


@dataclass(frozen=True)
class Delta:
    """ΔW = `scale`·B·A of one module.

    Attributes:
        b: B, shape (out, r), float64.
        a: A, shape (r, in), float64.
        scale: alpha / r, or alpha / √r with rsLoRA.
    """

    b: NDArray[np.float64]
    a: NDArray[np.float64]
    scale: float


class Adapter:
    """The modules of an open adapter folder; each is read when it is asked for.

    Args:
        folder: The PEFT folder, for messages.
        files: Its open weight files.
        config: Its `adapter_config.json`.

    Raises:
        InputError: Something in it is no LoRA factor, or stands in it twice.
    """

    def __init__(self, folder: Path, files: Sequence[TensorFile], config: dict) -> None:
        self.folder = folder
        self._config = config
        self._factors: dict[str, dict[str, tuple[TensorFile, str]]] = {}
        for file in files:
            for key in file.names:
                match = _KEY.match(key)
                if match is None:
                    raise InputError(f"{folder}: {key} is no LoRA factor")
                factors = self._factors.setdefault(match["module"], {})
                if match["factor"] in factors:
                    raise InputError(f"{folder}: {key} stands in two files")
                factors[match["factor"]] = (file, key)
        if not self._factors:
            raise InputError(f"{folder}: no LoRA factor in it")
        for module, factors in self._factors.items():
            for name in "AB":
                if name not in factors:
                    raise InputError(f"{folder}: {module} has no lora_{name}")

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted(self._factors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of each module the shape of ΔW, (out, in), without reading it."""
        return {module: (self._shape(module, "B")[0], self._shape(module, "A")[1]) for module in self.modules}

    @property
    def ranks(self) -> dict[str, int]:
        """Of each module its rank, without reading it."""
        return {module: self._shape(module, "A")[0] for module in self.modules}

    def __getitem__(self, module: str) -> Delta:
        """The update of `module`.

        Raises:
            InputError: A factor is no matrix of its rank, or holds a value that is not finite.
        """
        a, b = self._read(module, "A"), self._read(module, "B")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
            raise InputError(f"{self.folder}: {module} has factors of shapes {b.shape} and {a.shape}")
        rank = a.shape[0]
        alpha = _for_module(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        return Delta(b, a, alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))

    def _shape(self, module: str, factor: str) -> tuple[int, ...]:
        file, key = self._factors[module][factor]
        shape = file.shape(key)
        if len(shape) != 2:
            raise InputError(f"{self.folder}: {key} is no matrix")
        return shape

    def _read(self, module: str, factor: str) -> NDArray[np.float64]:
        file, key = self._factors[module][factor]
        try:
            values = file.read(key).to(torch.float64).numpy()
        except (ValueError, OSError) as error:
            raise InputError(f"{self.folder}: {first_line(error)}") from error
        # A sum is finite only if all its terms are, and needs no array of its own.
        with np.errstate(invalid="ignore", over="ignore"):
            total = values.sum()
        if not math.isfinite(total) and not np.isfinite(values).all():
            raise InputError(f"{self.folder}: {key} holds values that are not finite")
        return values


@contextmanager
def open_adapter(folder: Path) -> Iterator[Adapter]:
    """Opens the PEFT LoRA adapter in `folder`, in one safetensors file or in several.

    Raises:
        InputError: It is not there, damaged, or not a LoRA adapter.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a readable PEFT adapter ({first_line(error)})") from error
    _require_lora(folder / "adapter_config.json", config)
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(TensorFile(file)) for file in _weight_files(folder)]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{folder}: not a readable PEFT adapter ({first_line(error)})") from error
        yield Adapter(folder, files, config)


def _require_lora(file: Path, config: Any) -> None:
    """Refuses a configuration whose scale cannot be read, or whose update is not B·A alone."""
    if not isinstance(config, dict) or "lora_alpha" not in config:
        raise InputError(f"{file}: no lora_alpha in it: not a LoRA adapter")
    if config.get("use_dora"):
        raise InputError(f"{file}: a DoRA adapter; its update is not B·A alone")
    initialised = str(config.get("init_lora_weights"))
    if initialised.startswith(_CHANGE_THE_BASE):
        raise InputError(
            f"{file}: init_lora_weights={initialised} changes the base too; save it converted to plain LoRA"
        )
    if config.get("alora_invocation_tokens"):
        raise InputError(f"{file}: an activated LoRA, whose update does not hold for every token")
    pattern = config.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise InputError(f"{file}: alpha_pattern is no mapping")
    for name, alpha in {"lora_alpha": config["lora_alpha"], **pattern}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise InputError(f"{file}: {name}: {alpha!r} is no finite number")
        try:
            re.compile(name)
        except re.error as error:
            raise InputError(f"{file}: alpha_pattern: {name!r} is no regular expression ({error})") from error


def _weight_files(folder: Path) -> list[Path]:
    """`adapter_model.safetensors`, or all of `adapter_model-00001-of-0000N.safetensors`."""
    whole = folder / "adapter_model.safetensors"
    shards = {int(match[1]): file for file in folder.glob("adapter_model-*") if (match := _SHARD.search(file.name))}
    if whole.exists() or not shards:
        return [whole]
    total = int(_SHARD.search(shards[min(shards)].name)[2])  # type: ignore[index]
    missing = [number for number in range(1, total + 1) if number not in shards]
    if missing:
        raise InputError(f"{folder}: file {missing[0]} of the adapter's {total} is missing")
    return [shards[number] for number in sorted(shards)]


def _for_module(pattern: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule for `alpha_pattern`: the first key that is the module's name or the end of it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
