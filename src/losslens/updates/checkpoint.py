"""Whole models as updates: the difference of a checkpoint to its base, read module by module."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from losslens.core.errors import InputError
from losslens.updates.base import Array
from losslens.updates.dense import DenseUpdate
from losslens.updates.dora import DoraAdapter
from losslens.updates.folder import LARGEST, Adapter, open_adapter
from losslens.updates.lora_config import LoraConfigFile
from losslens.updates.weights import Weights, is_checkpoint, open_weights

# Binary digits of a value, as safetensors names its type, and the distance between its smallest values.
_DIGITS = {"BF16": (8, 2.0**-133), "F16": (11, 2.0**-24)}


@dataclass(frozen=True)
class Composition:
    """Shares of the squared norm of a checkpoint's update.

    Attributes:
        inside: Σ‖ΔW‖² of some modules.
        outside: That of all other weights, such as embeddings, norms and biases.
        rounding: Expected squared norm that rounding to 16 bits adds to those modules: a twelfth of the squared
            distance of neighbouring values, summed over their weights; 0 if the checkpoint holds 32 bits.
    """

    inside: float
    outside: float
    rounding: float


class Checkpoint:
    """An open checkpoint and its base; ΔW of a module is read on access.

    Modules are the linear ones without the head, as those of PEFT's `all-linear`, and the parameters of each expert
    (`….experts.gate_up_proj[3]`). Embeddings, head, norms and biases are none (`composition` counts them).

    Args:
        trained: Tensors of the checkpoint.
        base: Tensors of the base.

    Raises:
        InputError: One of the two lacks a tensor of the other, or shapes differ.
    """

    def __init__(self, trained: Weights, base: Weights) -> None:
        self._trained, self._base = trained, base
        self._places = trained.matrices
        for first, second in ((trained, base), (base, trained)):
            for name in first.names:
                if name not in second:
                    raise InputError(f"{second.folder}: has no {name}, which {first.folder} has: another architecture")
        for name in trained.names:
            now, before = trained.shape(name), base.shape(name)
            grown = trained.may_grow(name)
            if now[grown:] != before[grown:] or len(now) != len(before):
                shapes = " and ".join(" × ".join(map(str, shape)) for shape in (now, before))
                module = name.removesuffix(".weight")
                raise InputError(f"{trained.folder}: {module} has another shape than in {base.folder} ({shapes})")
            if 0 in now:
                raise InputError(f"{trained.folder}: {name} is empty")

    @property
    def modules(self) -> list[str]:
        """Names of the modules, sorted."""
        return sorted(self._places)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of ΔW of each module, without reading it."""
        parts = {module: [self._trained.shape(p.name)[-2:] for p in self._places[module]] for module in self.modules}
        return {module: (sum(out for out, _ in shapes), shapes[0][1]) for module, shapes in parts.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Largest possible rank of each module."""
        return {module: min(shape) for module, shape in self.shapes.items()}

    def __getitem__(self, module: str) -> DenseUpdate:
        """Reads the update of `module`.

        Raises:
            InputError: A weight is not stored as a floating-point number, or not finite.
        """
        parts = self._places[module]
        change = np.ascontiguousarray(self._trained.matrix(*parts))
        with np.errstate(over="ignore"):
            change -= self._base.matrix(*parts)
            norm = float(np.linalg.norm(change))
        if not norm <= LARGEST:
            raise InputError(f"{self._trained.folder}: {module}: ‖ΔW‖ is {norm:.3g}; more than {LARGEST:g} is an error")
        return DenseUpdate(change)

    def composition(self, modules: Collection[str]) -> Composition:
        """Reads all weights, and says where the squared norm of the update lies.

        New rows of embeddings that were enlarged are not counted.

        Args:
            modules: Those that are compared.
        """
        compared = {part.name for module in modules for part in self._places[module]}
        inside = outside = rounding = 0.0
        for name in dict.fromkeys([*self._trained.names, *self._base.names]):
            if self._trained.is_tied(name) or self._base.is_tied(name):
                continue  # the input embeddings are counted
            digits = _DIGITS.get(self._trained.dtype(name))
            rows = min(self._trained.rows(name), self._base.rows(name))
            for now, before in zip(self._trained.blocks(name, rows), self._base.blocks(name, rows), strict=True):
                squared = float(np.sum((now - before) ** 2))
                if name in compared:
                    inside += squared
                    rounding += _rounding(now, *digits) if digits else 0.0
                else:
                    outside += squared
        return Composition(inside, outside, rounding)


def _rounding(values: Array, digits: int, least: float) -> float:
    """Returns the expected squared error of rounding to so many binary digits, summed over the values."""
    _, exponents = np.frexp(values)
    steps = np.maximum(np.ldexp(1.0, exponents - digits), least)
    return float(np.sum(steps[values != 0] ** 2)) / 12


OpenUpdate = Adapter | DoraAdapter | Checkpoint


@contextmanager
def open_update(folder: Path, base: Path | None) -> Iterator[OpenUpdate]:
    """Opens a LoRA or DoRA adapter, or a whole model as a difference to its base.

    Args:
        folder: A PEFT folder, or one of transformers.
        base: Folder of the base's weights; LoRA needs none.

    Raises:
        InputError: Files are missing or damaged; DoRA or a model comes without its base, or with that of another
            architecture.
    """
    with ExitStack() as stack:
        if is_checkpoint(folder):
            if base is None:
                raise InputError(f"{folder}: a whole model is compared with its base; {_ADVICE}")
            yield Checkpoint(*(stack.enter_context(open_weights(place)) for place in (folder, base)))
        elif needs_base(folder):
            if base is None:
                raise InputError(f"{folder}: the update of a DoRA adapter depends on the base; {_ADVICE}")
            adapter = stack.enter_context(open_adapter(folder, dora=True))
            yield DoraAdapter(adapter, stack.enter_context(open_weights(base)))
        else:
            yield stack.enter_context(open_adapter(folder))


_ADVICE = "give model_path=FOLDER (losslens compare: --base FOLDER, losslens.compare: base=FOLDER)"


def needs_base(folder: Path) -> bool:
    """True if an update cannot be read without its base: a whole model or DoRA.

    Raises:
        InputError: The adapter is missing or damaged, or of a kind that is not read.
    """
    return is_checkpoint(folder) or LoraConfigFile(folder / "adapter_config.json").use_dora
