"""Reads the update of one module after another from a PEFT LoRA folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from losslens.errors import InputError, first_line

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
        file: Its open safetensors file.
        config: Its `adapter_config.json`.
    """

    def __init__(self, folder: Path, file: safe_open, config: dict) -> None:
        self.folder = folder
        self._file = file
        self._config = config
        self._keys: dict[str, dict[str, str]] = {}
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            match = _KEY.match(key)
            if match is None:
                raise InputError(f"{folder}: {key} is no LoRA factor")
            self._keys.setdefault(match["module"], {})[match["factor"]] = key

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted(self._keys)

    def __getitem__(self, module: str) -> Delta:
        """The update of `module`.

        Raises:
            InputError: A factor is missing or holds a value that is not finite.
        """
        keys = self._keys[module]
        factors = {}
        for name in "AB":
            if name not in keys:
                raise InputError(f"{self.folder}: {module} has no lora_{name}")
            factors[name] = self._file.get_tensor(keys[name]).to(torch.float64).numpy()
            if not np.isfinite(factors[name]).all():
                raise InputError(f"{self.folder}: {keys[name]} holds values that are not finite")
        rank = factors["A"].shape[0]
        alpha = _for_module(self._config.get("alpha_pattern"), module, self._config["lora_alpha"])
        return Delta(factors["B"], factors["A"], alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))


@contextmanager
def open_adapter(folder: Path) -> Iterator[Adapter]:
    """Opens the PEFT LoRA adapter in `folder`.

    Raises:
        InputError: It is not there, damaged, or not a LoRA adapter.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        opened = safe_open(folder / "adapter_model.safetensors", framework="pt")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable PEFT adapter ({first_line(error)})") from error
    if "lora_alpha" not in config:
        raise InputError(f"{folder / 'adapter_config.json'}: no lora_alpha in it: not a LoRA adapter")
    with opened as file:
        yield Adapter(folder, file, config)


def _for_module(pattern: dict[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule for `alpha_pattern`: the first key that is the module's name or the end of it."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
