"""PEFT LoRA folders: reads updates module by module, and writes updates as a folder."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from losslens.core.errors import InputError, first_line
from losslens.core.files import write_json
from losslens.updates.base import Array
from losslens.updates.lora import LoraUpdate
from losslens.updates.lora_config import LoraConfigFile
from losslens.updates.tensor_file import TensorFile

_SHARD = re.compile(r"^adapter_model-(\d+)-of-(\d+)\.safetensors$")
_LARGEST = 1e100  # largest ‖ΔW‖; products of two such norms are still finite
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


class Adapter:
    """An open adapter folder; the update of a module is read on access.

    Args:
        folder: The PEFT folder, for messages.
        files: Its open weight files.
        config: Its `adapter_config.json`.

    Raises:
        InputError: A tensor is not a LoRA factor or occurs twice, or a factor is missing.
    """

    def __init__(self, folder: Path, files: Sequence[TensorFile], config: LoraConfigFile) -> None:
        self.folder = folder
        self._config = config
        self._factors: dict[str, dict[str, tuple[TensorFile, str]]] = {}
        for file in files:
            for key in file.names:
                match = _KEY.match(key)
                if match is None or ".base_layer." in f".{match['module']}.":
                    kind = " of a linear module" if "lora_" in key else ""
                    raise InputError(f"{folder}: {key} is not a LoRA factor{kind}")
                factors = self._factors.setdefault(match["module"], {})
                if match["factor"] in factors:
                    raise InputError(f"{folder}: {key} occurs twice")
                factors[match["factor"]] = (file, key)
        if not self._factors:
            raise InputError(f"{folder}: contains no LoRA factors")
        for module, factors in self._factors.items():
            if not config.puts_on(module):
                raise InputError(f"{folder}: {module} is not among the target_modules of adapter_config.json")
            for name in "AB":
                if name not in factors:
                    raise InputError(f"{folder}: {module} has no lora_{name}")

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted(self._factors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of ΔW of each module, without reading it."""
        return {module: (self._shape(module, "B")[0], self._shape(module, "A")[1]) for module in self.modules}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module, without reading it."""
        return {module: self._shape(module, "A")[0] for module in self.modules}

    def __getitem__(self, module: str) -> LoraUpdate:
        """Reads the update of `module`.

        Raises:
            InputError: The factors do not fit each other or the configured rank, or a value is not finite.
        """
        a, b = self._read(module, "A"), self._read(module, "B")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
            raise InputError(f"{self.folder}: {module}: the shapes {b.shape} of B and {a.shape} of A do not fit")
        rank = a.shape[0]
        if (configured := self._config.rank(module)) not in (None, rank):
            raise InputError(f"{self.folder}: {module} has rank {rank}, but adapter_config.json says {configured}")
        scale = self._config.scale(module, rank)
        with np.errstate(over="ignore"):
            largest = abs(scale) * np.linalg.norm(b) * np.linalg.norm(a)
        if not largest <= _LARGEST:
            raise InputError(
                f"{self.folder}: the update of {module} is too large to measure (check lora_alpha and weights)"
            )
        return LoraUpdate(b, a, scale)

    def _shape(self, module: str, factor: str) -> tuple[int, ...]:
        file, key = self._factors[module][factor]
        shape = file.shape(key)
        if len(shape) != 2:
            raise InputError(f"{self.folder}: {key} is not a matrix")
        return shape

    def _read(self, module: str, factor: str) -> Array:
        file, key = self._factors[module][factor]
        try:
            values = file.read(key)
        except (ValueError, OSError) as error:
            raise InputError(f"{self.folder}: {first_line(error)}") from error
        # A finite sum implies finite terms, and needs no extra array.
        with np.errstate(invalid="ignore", over="ignore"):
            total = values.sum()
        if not math.isfinite(total) and not np.isfinite(values).all():
            raise InputError(f"{self.folder}: {key} contains non-finite values")
        return values


@contextmanager
def open_adapter(folder: Path) -> Iterator[Adapter]:
    """Opens the PEFT LoRA adapter in `folder`, stored in one or several safetensors files.

    Raises:
        InputError: The adapter is missing, damaged, or not a LoRA adapter.
    """
    config = LoraConfigFile(folder / "adapter_config.json")
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(TensorFile(file)) for file in _weight_files(folder)]
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise InputError(f"{folder}: not a readable PEFT adapter ({first_line(error)})") from error
        yield Adapter(folder, files, config)


def _weight_files(folder: Path) -> list[Path]:
    """Returns `adapter_model.safetensors`, or all shards `adapter_model-00001-of-0000N.safetensors`."""
    whole = folder / "adapter_model.safetensors"
    shards = [
        (int(m[1]), int(m[2]), file) for file in folder.glob("adapter_model-*") if (m := _SHARD.search(file.name))
    ]
    if whole.is_file() or not shards:
        if not whole.is_file() and (pickled := sorted(folder.glob("adapter_model*.bin"))):
            raise InputError(f"{pickled[0]}: pickle files can run code and are not read; save it as safetensors")
        if not whole.is_file():
            raise InputError(f"{whole}: no such file")
        return [whole]
    total = max(of for _, of, _ in shards)
    of_total = {number: file for number, of, file in shards if of == total}
    missing = next((number for number in range(1, total + 1) if number not in of_total), None)
    if missing is not None or len(of_total) != len(shards):
        raise InputError(f"{folder}: shard {missing or 1} of {total} is missing or belongs to another adapter")
    return [of_total[number] for number in sorted(of_total)]


def write_adapter(folder: Path, updates: Mapping[str, LoraUpdate], config: Mapping[str, Any]) -> None:
    """Writes updates by module as a PEFT folder: float32 factors, a scale of 1, other fields from `config`."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{module}.lora_{name}.weight": np.ascontiguousarray(factor, dtype=np.float32)
        for module, update in updates.items()
        for name, factor in (("A", update.a), ("B", update.scale * update.b))
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # With alpha = rank, PEFT scales by 1.
    ranks = {module: update.rank for module, update in updates.items()}
    rank = max(ranks.values())
    patterns = {} if set(ranks.values()) == {rank} else ranks
    scale = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": patterns, "alpha_pattern": patterns}
    write_json(folder / "adapter_config.json", {**config, **scale})
