"""DoRA adapters (2402.09353): each row of W0 + s·B·A is given a trained norm."""

from __future__ import annotations

import numpy as np

from losslens.core.errors import InputError
from losslens.updates.dense import DenseUpdate
from losslens.updates.folder import Adapter
from losslens.updates.weights import Part, Weights


class DoraAdapter:
    """An open DoRA adapter and its base; ΔW = m·(W0 + s·B·A)/‖W0 + s·B·A‖ − W0, the norms those of rows.

    Args:
        adapter: The adapter.
        base: Tensors of the base.

    Raises:
        InputError: The base lacks a module of the adapter, or has it in another shape.
    """

    def __init__(self, adapter: Adapter, base: Weights) -> None:
        self._adapter, self._base = adapter, base
        for module, shape in adapter.shapes.items():
            name = f"{module}.weight"
            if name not in base:
                raise InputError(f"{base.folder}: has no {module}, which {adapter.folder} adapts: another base")
            if base.shape(name) != shape:
                raise InputError(f"{adapter.folder}: {module} has another shape than in {base.folder}")

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return self._adapter.modules

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape (out, in) of ΔW of each module, without reading it."""
        return self._adapter.shapes

    @property
    def ranks(self) -> dict[str, int]:
        """Largest possible rank of each module: the norms of rows can make it any."""
        return {module: min(shape) for module, shape in self.shapes.items()}

    def __getitem__(self, module: str) -> DenseUpdate:
        """Reads the update of `module`.

        Raises:
            InputError: A tensor is damaged, or the norms are not one for each row.
        """
        magnitude = self._adapter.magnitude(module)
        before = self._base.matrix(Part(f"{module}.weight"))
        after = before + self._adapter[module].dense()
        norms = np.linalg.norm(after, axis=1)
        if magnitude.shape != norms.shape:
            raise InputError(f"{self._adapter.folder}: {module} has {magnitude.size} norms for {norms.size} rows")
        # A row of zeros stays one; PEFT would divide by zero.
        after *= np.divide(magnitude, norms, out=np.zeros_like(norms), where=norms > 0)[:, None]
        after -= before
        return DenseUpdate(after)
