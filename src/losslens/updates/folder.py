"""PEFT LoRA folders: reads updates module by module, and writes updates as a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from losslens.updates.tensor_file import TensorFile, read_finite

_SHARD = re.compile(r"^adapter_model-(\d+)-of-(\d+)\.safetensors$")
_EXPERT = re.compile(r"\[\d+\]$")
LARGEST = 1e100  # largest ‖ΔW‖; products of two such norms are still finite
_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\."
    r"(?:lora_(?P<factor>[AB])\.weight|lora_(?P<magnitude>magnitude_vector)(?:\.weight)?)$"
)


@dataclass(frozen=True)
class _Place:
    """A tensor in a file."""

    file: TensorFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.key)


@dataclass(frozen=True)
class _Factors:
    """Place of the factors of a module: those of expert `number` of `count`, or all of both tensors."""

    a: _Place
    b: _Place
    number: int = 0
    count: int = 1


class Adapter:
    """An open adapter folder; the update of a module is read on access.

    The experts whose weights lie in one tensor are modules of their own (`….experts.gate_up_proj[3]`).

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
        self._factors: dict[str, _Factors] = {}
        self._magnitudes: dict[str, _Place] = {}
        tensors = self._tensors(files)
        for (module, depth), found in tensors.items():
            parameters = config.parameters_of(module)
            if not parameters and not config.puts_on(module):
                raise InputError(f"{folder}: {module} is not among the target_modules of adapter_config.json")
            for name in ("A", "B", *["magnitude_vector"] * config.use_dora):
                if name not in found:
                    raise InputError(f"{folder}: {module} has no lora_{name}")
            if config.use_dora:
                self._magnitudes[module] = found["magnitude_vector"]
            if not parameters:
                self._factors[module] = _Factors(found["A"], found["B"])
                continue
            levels = sum(other == module for other, _ in tensors)
            if levels != len(parameters):
                raise InputError(f"{folder}: {module} has {levels} pairs of factors for {', '.join(parameters)}")
            # The inmost parameter has the most `base_layer` in its name.
            self._add_parameter(module, parameters[levels - 1 - depth], found)

    def _tensors(self, files: Sequence[TensorFile]) -> dict[tuple[str, int], dict[str, _Place]]:
        """Returns the tensors of each module, and of each of its adapted parameters, by their kind."""
        tensors: dict[tuple[str, int], dict[str, _Place]] = {}
        for file in files:
            for key in file.names:
                match = _KEY.match(key)
                kind = match and (match["factor"] or match["magnitude"])
                depth = match["nested"].count(".base_layer") if match else 0
                if (
                    match is None
                    or not kind
                    or (match["magnitude"] and not self._config.use_dora)
                    or (depth and not self._config.parameters_of(match["module"]))
                ):
                    which = " of a linear module" if "lora_" in key else ""
                    if key.endswith(".base_layer.weight"):
                        which += ": PEFT saved the base's head or embeddings, which are not compared"
                    raise InputError(f"{self.folder}: {key} is not a LoRA factor{which}")
                found = tensors.setdefault((match["module"], depth), {})
                if kind in found:
                    raise InputError(f"{self.folder}: {key} occurs twice")
                found[kind] = _Place(file, key)
        if not tensors:
            raise InputError(f"{self.folder}: contains no LoRA factors")
        return tensors

    def _add_parameter(self, module: str, parameter: str, found: Mapping[str, _Place]) -> None:
        """Adds an adapted parameter: the weight of a linear module, or that of each expert."""
        name = f"{module}.{parameter}"
        rank, rows = self._config.rank(name), found["A"].shape[0]
        if not rank or rows % rank:
            raise InputError(f"{self.folder}: {name}: lora_A has {rows} rows, not a multiple of the rank {rank}")
        if parameter == "weight" and rows == rank:
            self._factors[module] = _Factors(found["A"], found["B"])
            return
        for number in range(rows // rank):
            self._factors[f"{name}[{number}]"] = _Factors(found["A"], found["B"], number, rows // rank)

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted(self._factors)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of ΔW of each module, without reading it."""
        return {module: (self._shape(module, "b")[0], self._shape(module, "a")[1]) for module in self.modules}

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each module, without reading it."""
        return {module: self._shape(module, "a")[0] // self._factors[module].count for module in self.modules}

    def __getitem__(self, module: str) -> LoraUpdate:
        """Reads the update of `module`.

        Raises:
            InputError: The factors do not fit each other or the configured rank, or a value is not finite.
        """
        a, b = self._read_factors(self._factors[module])
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.size or not b.size:
            raise InputError(f"{self.folder}: {module}: the shapes {b.shape} of B and {a.shape} of A do not fit")
        rank, name = a.shape[0], _EXPERT.sub("", module)
        if (configured := self._config.rank(name)) not in (None, rank):
            raise InputError(f"{self.folder}: {module} has rank {rank}, but adapter_config.json says {configured}")
        scale = self._config.scale(name, rank)
        with np.errstate(over="ignore"):
            largest = abs(scale) * np.linalg.norm(b) * np.linalg.norm(a)
        if not largest <= LARGEST:
            raise InputError(
                f"{self.folder}: the update of {module} is too large to measure (check lora_alpha and weights)"
            )
        return LoraUpdate(b, a, scale)

    def magnitude(self, module: str) -> Array:
        """Reads the trained norms of the rows of `module`, a DoRA adapter's, shape (out,).

        Raises:
            InputError: A value is not finite.
        """
        return self._read(self._magnitudes[module]).ravel()

    def _shape(self, module: str, factor: str) -> tuple[int, ...]:
        place: _Place = getattr(self._factors[module], factor)
        if len(place.shape) != 2:
            raise InputError(f"{self.folder}: {place.key} is not a matrix")
        return place.shape

    def _read_factors(self, factors: _Factors) -> tuple[Array, Array]:
        """Reads A and B; in PEFT's layout the rows of A lie expert by expert, and the columns of B rank by rank."""
        number, count = factors.number, factors.count
        if count == 1:
            return self._read(factors.a), self._read(factors.b)
        rank = factors.a.shape[0] // count
        a = self._read(factors.a, slice(number * rank, (number + 1) * rank))
        return a, self._read(factors.b)[:, number::count]

    def _read(self, place: _Place, rows: slice | None = None) -> Array:
        return read_finite(self.folder, place.file, place.key, rows)


@contextmanager
def open_adapter(folder: Path, *, dora: bool = False) -> Iterator[Adapter]:
    """Opens the PEFT LoRA adapter in `folder`, stored in one or several safetensors files.

    Args:
        folder: The PEFT folder.
        dora: Accepts a DoRA adapter, whose update its factors and norms alone do not tell (`DoraAdapter`).

    Raises:
        InputError: The adapter is missing, damaged, or not a LoRA adapter.
    """
    config = LoraConfigFile(folder / "adapter_config.json")
    if config.use_dora and not dora:
        raise InputError(f"{config.file}: use_dora=true: a DoRA adapter, whose update is not B·A alone")
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
