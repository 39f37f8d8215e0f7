"""PEFT LoRA folders: reads the update of one module after another, and writes updates as a folder."""

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
_LARGEST = 1e100  # ‖ΔW‖: its square is finite, and so are products of two of them
_KEY = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")


class Adapter:
    """The modules of an open adapter folder; each is read when it is asked for.

    Args:
        folder: The PEFT folder, for messages.
        files: Its open weight files.
        config: Its `adapter_config.json`.

    Raises:
        InputError: Something in it is no LoRA factor, or stands in it twice.
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
                    raise InputError(f"{folder}: {key} is no LoRA factor{kind}")
                factors = self._factors.setdefault(match["module"], {})
                if match["factor"] in factors:
                    raise InputError(f"{folder}: {key} stands in it twice")
                factors[match["factor"]] = (file, key)
        if not self._factors:
            raise InputError(f"{folder}: no LoRA factor in it")
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
        """Of each module the shape of ΔW, (out, in), without reading it."""
        return {module: (self._shape(module, "B")[0], self._shape(module, "A")[1]) for module in self.modules}

    @property
    def ranks(self) -> dict[str, int]:
        """Of each module its rank, without reading it."""
        return {module: self._shape(module, "A")[0] for module in self.modules}

    def __getitem__(self, module: str) -> LoraUpdate:
        """The update of `module`.

        Raises:
            InputError: A factor is no matrix of its rank, or holds a value that is not finite.
        """
        a, b = self._read(module, "A"), self._read(module, "B")
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
            raise InputError(f"{self.folder}: {module} has factors of shapes {b.shape} and {a.shape}")
        rank = a.shape[0]
        if (said := self._config.rank(module)) not in (None, rank):
            raise InputError(f"{self.folder}: {module} has rank {rank}, and in adapter_config.json {said}")
        scale = self._config.scale(module, rank)
        with np.errstate(over="ignore"):
            largest = abs(scale) * np.linalg.norm(b) * np.linalg.norm(a)
        if not largest <= _LARGEST:
            raise InputError(f"{self.folder}: the update of {module} is too large to be measured (lora_alpha, weights)")
        return LoraUpdate(b, a, scale)

    def _shape(self, module: str, factor: str) -> tuple[int, ...]:
        file, key = self._factors[module][factor]
        shape = file.shape(key)
        if len(shape) != 2:
            raise InputError(f"{self.folder}: {key} is no matrix")
        return shape

    def _read(self, module: str, factor: str) -> Array:
        file, key = self._factors[module][factor]
        try:
            values = file.read(key)
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
    config = LoraConfigFile(folder / "adapter_config.json")
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(TensorFile(file)) for file in _weight_files(folder)]
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise InputError(f"{folder}: not a readable PEFT adapter ({first_line(error)})") from error
        yield Adapter(folder, files, config)


def _weight_files(folder: Path) -> list[Path]:
    """`adapter_model.safetensors`, or all of `adapter_model-00001-of-0000N.safetensors`."""
    whole = folder / "adapter_model.safetensors"
    shards = [
        (int(m[1]), int(m[2]), file) for file in folder.glob("adapter_model-*") if (m := _SHARD.search(file.name))
    ]
    if whole.is_file() or not shards:
        if not whole.is_file() and (pickled := sorted(folder.glob("adapter_model*.bin"))):
            raise InputError(f"{pickled[0]}: save it as safetensors; a pickle can run code, and is not read")
        if not whole.is_file():
            raise InputError(f"{whole}: no such file")
        return [whole]
    total = max(of for _, of, _ in shards)
    found = {number: file for number, of, file in shards if of == total}
    missing = next((number for number in range(1, total + 1) if number not in found), None)
    if missing is not None or len(found) != len(shards):
        raise InputError(f"{folder}: file {missing or 1} of the adapter's {total} is missing, or of another adapter")
    return [found[number] for number in sorted(found)]


def write_adapter(folder: Path, updates: Mapping[str, LoraUpdate], config: Mapping[str, Any]) -> None:
    """Writes updates, by module, as a PEFT folder with a scale of 1 and all else as in `config`; factors in float32."""
    folder.mkdir()
    tensors = {
        f"base_model.model.{module}.lora_{name}.weight": np.ascontiguousarray(factor, dtype=np.float32)
        for module, update in updates.items()
        for name, factor in (("A", update.a), ("B", update.scale * update.b))
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # With alpha = rank PEFT multiplies by 1.
    ranks = {module: update.rank for module, update in updates.items()}
    rank = max(ranks.values())
    patterns = {} if set(ranks.values()) == {rank} else ranks
    scale = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": patterns, "alpha_pattern": patterns}
    write_json(folder / "adapter_config.json", {**config, **scale})
