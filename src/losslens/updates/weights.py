"""Tensors of a checkpoint in transformers' layout, in one safetensors file or in shards, read one at a time."""

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
from safetensors import SafetensorError

from losslens.core.errors import InputError, first_line
from losslens.updates.base import Array
from losslens.updates.tensor_file import TensorFile, read_finite

# What wrappers put before a name, and what a model without its language-model head leaves out.
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.|base_model\.model\.)+")
_BARE = (
    (re.compile(r"^(?:layers|embed_tokens|norm)\."), "model."),
    (re.compile(r"^(?:h|wte|wpe|ln_f|word_embeddings|word_embeddings_layernorm)\."), "transformer."),
)
# Constants that some versions of transformers saved.
_CONSTANTS = re.compile(r"(?:rotary_emb\.inv_freq|\.attn\.bias|\.attention\.bias|\.masked_bias)$")
_VOCABULARY = re.compile(r"(?:^|\.)(?:lm_head|embed_out|wte|wpe|\w*embed\w*)$")
_HEAD = re.compile(r"^(?:lm_head|embed_out)\.weight$")
_INPUT = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_EXPERTS = re.compile(r"\.experts\.\w+$")
# Experts that lie in tensors of their own, where transformers 5 and PEFT have one parameter for all of them.
_EXPERT = re.compile(r"^(?P<block>.+)\.experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight$")
_STACKED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
# Models whose weights lie as (in, out): linear modules of GPT-2's kind, and experts.
_IN_OUT = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_EXPERTS_IN_OUT = {"gpt_oss", "llama4", "llama4_text"}

_BLOCK = 2**24  # values read at once where no whole matrix is needed


@dataclass(frozen=True)
class Part:
    """A matrix or a part of one.

    Attributes:
        name: Its tensor.
        expert: Its number in a tensor that holds those of several experts.
    """

    name: str
    expert: int | None = None


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Returns True for a tensor that holds weights of modules that are compared: of a linear one, or of experts.

    Embeddings, heads, norms, biases, convolutions and the states of recurrent layers are none.

    Args:
        name: Its name in a causal language model.
        shape: Its shape.
    """
    module = name.removesuffix(".weight")
    if len(shape) == 2:
        return module != name and not _VOCABULARY.search(module)
    return len(shape) == 3 and _EXPERTS.search(name) is not None


class Weights:
    """The open tensors of a checkpoint, by the names that they have in a causal language model.

    Args:
        folder: The folder, for messages.
        files: The file of each tensor, by the name in it.
        config: Its config.json.

    Raises:
        InputError: Two tensors are one, or the head is missing although it is not tied.
    """

    def __init__(self, folder: Path, files: dict[str, TensorFile], config: dict[str, Any]) -> None:
        self.folder = folder
        self._places: dict[str, tuple[TensorFile, str]] = {}
        for name, file in files.items():
            if _CONSTANTS.search(name):
                continue
            if (usual := _usual(name)) in self._places:
                raise InputError(f"{folder}: {usual} occurs twice, as {name} and {self._places[usual][1]}")
            self._places[usual] = (file, name)
        model_type = config.get("model_type")
        if not isinstance(model_type, str | None):
            raise InputError(f"{folder / 'config.json'}: model_type is not a name")
        self._linear_in_out, self._experts_in_out = model_type in _IN_OUT, model_type in _EXPERTS_IN_OUT
        heads, inputs = ([name for name in self._places if kind.search(name)] for kind in (_HEAD, _INPUT))
        self._input = inputs[0] if inputs and not heads else None
        if self._input is not None and config.get("tie_word_embeddings") is False:
            raise InputError(f"{folder}: has no lm_head, although config.json says that it is not tied")

    @property
    def names(self) -> list[str]:
        """Names of the stored tensors; a head that is tied to the input embeddings is stored once."""
        return list(self._places)

    @property
    def matrices(self) -> dict[str, tuple[Part, ...]]:
        """The tensors of each linear module's weight, one above the other; without embeddings and head.

        Experts are named as in transformers 5, however they are stored: `….mlp.experts.gate_up_proj[3]`.
        """
        found: dict[str, tuple[Part, ...]] = {}
        for name in self._places:
            module, shape = name.removesuffix(".weight"), self._stored_shape(name)
            if not is_matrix(name, shape):
                continue
            if len(shape) == 2:
                found |= self._expert(name) or {module: (Part(name),)}
            else:
                found |= {f"{name}[{number}]": (Part(name, number),) for number in range(shape[0])}
        return found

    def _expert(self, name: str) -> dict[str, tuple[Part, ...]]:
        """Returns the parameter of an expert of which a tensor is a part; empty if there is none."""
        if not (match := _EXPERT.match(name)):
            return {}
        start = f"{match['block']}.experts.{match['number']}"
        for stacked, ways in _STACKED.items():
            for parts in ways:
                tensors = tuple(Part(f"{start}.{part}.weight") for part in parts)
                if match["part"] in parts and all(part.name in self for part in tensors):
                    block = re.sub(r"block_sparse_moe$", "mlp", match["block"])
                    return {f"{block}.experts.{stacked}[{match['number']}]": tensors}
        return {}

    def __contains__(self, name: str) -> bool:
        return name in self._places or self.is_tied(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; that of a linear module's weight is (out, in), and of experts' (experts, out, in)."""
        shape = self._stored_shape(name)
        return (*shape[:-2], shape[-1], shape[-2]) if self._lies_in_out(name, shape) else shape

    def rows(self, name: str) -> int:
        """Number of rows of a tensor as it is stored, for `blocks`; 0 of a single number."""
        return next(iter(self._stored_shape(name)), 0)

    def is_tied(self, name: str) -> bool:
        """Returns True for a head that is not stored, since it is tied to the input embeddings."""
        return self._input is not None and name not in self._places and _HEAD.search(name) is not None

    def may_grow(self, name: str) -> bool:
        """Returns True for embeddings and heads, whose first dimension is the size of the vocabulary."""
        return _VOCABULARY.search(name.removesuffix(".weight").removesuffix(".bias")) is not None

    def dtype(self, name: str) -> str:
        """Type of a tensor's values as safetensors names it, such as `BF16`."""
        file, key = self._place(name)
        return file.dtype(key)

    def matrix(self, *parts: Part) -> Array:
        """Reads a matrix, shape (out, in), from its parts.

        Raises:
            InputError: It is not stored as floating-point numbers, or a value is not finite.
        """
        found = [self._part(part) for part in parts]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _part(self, part: Part) -> Array:
        values = self._read(part.name, None if part.expert is None else slice(part.expert, part.expert + 1))
        values = values if part.expert is None else values[0]
        return values.T if self._lies_in_out(part.name, self._stored_shape(part.name)) else values

    def blocks(self, name: str, rows: int) -> Iterator[Array]:
        """Reads the first `rows` of a tensor in parts, so that an embedding need not fit in memory.

        Raises:
            InputError: As for `matrix`.
        """
        shape = self._stored_shape(name)
        step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        for start in range(0, rows, step):
            yield self._read(name, slice(start, min(start + step, rows)))

    def _read(self, name: str, rows: slice | None) -> Array:
        file, key = self._place(name)
        return read_finite(self.folder, file, key, rows)

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        file, key = self._place(name)
        return file.shape(key)

    def _place(self, name: str) -> tuple[TensorFile, str]:
        return self._places[self._input if self._input is not None and self.is_tied(name) else name]

    def _lies_in_out(self, name: str, shape: tuple[int, ...]) -> bool:
        is_linear = len(shape) == 2 and not _VOCABULARY.search(name.removesuffix(".weight"))
        return (is_linear and self._linear_in_out) or (len(shape) == 3 and self._experts_in_out)


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Opens a checkpoint: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        InputError: A file is missing or damaged, or the weights are pickled.
    """
    with ExitStack() as stack:
        try:
            opened = {file: stack.enter_context(TensorFile(file)) for file in _files(folder)}
        except (OSError, SafetensorError, ValueError, RecursionError) as error:
            raise InputError(f"{folder}: not a readable checkpoint ({first_line(error)})") from error
        tensors: dict[str, TensorFile] = {}
        for file in opened.values():
            for name in file.names:
                if name in tensors:
                    raise InputError(f"{folder}: {name} occurs twice")
                tensors[name] = file
        yield Weights(folder, tensors, _json(folder / "config.json") if (folder / "config.json").is_file() else {})


def is_checkpoint(folder: Path) -> bool:
    """True if a folder has the files of a whole model, and none of an adapter."""
    has_weights = any(folder.glob("model*.safetensors")) or (folder / "model.safetensors.index.json").is_file()
    return not (folder / "adapter_config.json").exists() and (has_weights or (folder / "config.json").is_file())


def _files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if pickled := sorted(folder.glob("pytorch_model*.bin")):
            raise InputError(f"{pickled[0]}: pickle files can run code and are not read; save it as safetensors")
        raise InputError(f"{folder}: neither model.safetensors nor model.safetensors.index.json")
    listed = _json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise InputError(f"{index}: lists no shards (weight_map)")
    shards = sorted(set(listed.values()))
    for name in shards:
        if Path(name).name != name:
            raise InputError(f"{index}: {name} is not a file beside it")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: no such file, but {index.name} lists it")
    return [folder / name for name in shards]


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a mapping")
    return content


def _usual(name: str) -> str:
    name = _WRAPPERS.sub("", name)
    return next((f"{prefix}{name}" for start, prefix in _BARE if start.match(name)), name)
