"""Whole models as updates: the difference of a checkpoint to its base, read module by module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from losslens.core.errors import InputError, first_line
from losslens.updates.dense import DenseUpdate
from losslens.updates.folder import Adapter, open_adapter
from losslens.updates.tensor_file import TensorFile


class Checkpoint:
    """An open checkpoint and its base; ΔW of a module is read on access.

    Args:
        trained: Tensors of the checkpoint, by name.
        base: Tensors of the base, by name.
    """

    def __init__(self, trained: dict[str, TensorFile], base: dict[str, TensorFile]) -> None:
        self._trained, self._base = trained, base

    @property
    def modules(self) -> list[str]:
        """Names of the modules with a matrix as weight, sorted."""
        return sorted(self.shapes)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of ΔW of each module, without reading it."""
        shapes = {name: file.shape(name) for name, file in self._trained.items() if name.endswith(".weight")}
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in sorted(shapes.items())
            if len(shape) == 2 and name in self._base
        }

    @property
    def ranks(self) -> dict[str, int]:
        """Largest possible rank of each module."""
        return {module: min(shape) for module, shape in self.shapes.items()}

    def __getitem__(self, module: str) -> DenseUpdate:
        """Reads the update of `module`."""
        name = f"{module}.weight"
        return DenseUpdate(self._trained[name].read(name) - self._base[name].read(name))


OpenUpdate = Adapter | Checkpoint


@contextmanager
def open_update(folder: Path, base: Path | None) -> Iterator[OpenUpdate]:
    """Opens an adapter, or a whole model as a difference to its base.

    Args:
        folder: A PEFT folder, or one of transformers.
        base: Folder of the base; needed for a model only.

    Raises:
        InputError: Files are missing or damaged, or a model comes without its base.
    """
    with ExitStack() as stack:
        if not (folder / "config.json").is_file():
            yield stack.enter_context(open_adapter(folder))
            return
        if base is None:
            raise InputError(f"{folder}: a whole model is compared with its base; give model_path=FOLDER")
        yield Checkpoint(*(_tensors(place, stack) for place in (folder, base)))


def _tensors(folder: Path, stack: ExitStack) -> dict[str, TensorFile]:
    try:
        files = [stack.enter_context(TensorFile(file)) for file in sorted(folder.glob("model*.safetensors"))]
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{folder}: not a readable model ({first_line(error)})") from error
    if not files:
        raise InputError(f"{folder}: contains no model.safetensors")
    return {name: file for file in files for name in file.names}
