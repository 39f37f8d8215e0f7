"""Reads a PEFT configuration as LoRA, ΔW = scale·B·A on linear modules and experts, or DoRA; rejects other variants."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import regex

from losslens.core.errors import InputError, first_line
from losslens.core.patterns import compile_pattern

# Fields on placement, training or initialisation that do not affect what the adapter adds to the base.
# `fan_in_fan_out` describes how the base stores its weight; each `*_config` matters only for its initialisation.
_WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "use_dora",
    "target_parameters",
}  # fmt: skip
# Initialisations that leave the base unchanged; all others change its weights or are unknown.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {})
# Why a field must be off. A field in none of these lists comes from another version of PEFT.
_WHY = {
    "bias": "biases are trained too",
    "lora_bias": "biases are trained too",
    "modules_to_save": "whole modules are trained too",
    "trainable_token_indices": "embeddings of tokens are trained too",
    "layer_replication": "its layers are not those of the base",
    "alora_invocation_tokens": "an activated LoRA, whose update does not hold for every token",
    "arrow_config": "its update depends on the token (routing)",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it changes the base too",
    "use_qalora": "its input is pooled",
    "ensure_weight_tying": "tied modules share factors",
    "megatron_config": "Megatron layers are not supported",
    "velora_config": "an unsupported variant of LoRA",
    "monteclora_config": "an unsupported variant of LoRA",
}
# Parameters of experts, in the order in which transformers' modules have them.
_EXPERTS = ("gate_up_proj", "down_proj")
_SECONDS = 0.5  # timeout of one match of a pattern and a module name; normal patterns take microseconds
_LARGEST = 1e100  # far above any weight, with a finite square

_Value = TypeVar("_Value")


class LoraConfigFile:
    """The `adapter_config.json` of a LoRA or DoRA adapter.

    Attributes:
        file: Its path.
        use_dora: True if the norms of rows were trained, too.

    Args:
        file: Its path.

    Raises:
        InputError: The file cannot be read or describes another kind of adapter.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.parent.is_dir():
            raise InputError(f"{file.parent}: no such folder")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{file.parent}: not a readable PEFT adapter ({file.name}: {first_line(error)})"
            ) from error
        if isinstance(content, dict) and content.get("peft_type", "LORA") != "LORA":
            raise InputError(f"{file}: peft_type={_short(content['peft_type'])} is not supported, only LORA")
        if not isinstance(content, dict) or "lora_alpha" not in content:
            raise InputError(f"{file}: not a LoRA adapter (no lora_alpha)")
        self._refuse_variants(content)
        self._targets, self._excluded = (self._names(content, name) for name in ("target_modules", "exclude_modules"))
        self._alpha = self._number("lora_alpha", content["lora_alpha"])
        self._rank = None if "r" not in content else self._whole("r", content["r"])
        self._rslora = self._switch("use_rslora", content.get("use_rslora", False))
        self.use_dora = self._switch("use_dora", content.get("use_dora") or False)
        self._parameters = self._names(content, "target_parameters")
        if isinstance(content.get("target_parameters"), str):
            raise InputError(
                f"{file}: target_parameters: {_short(content['target_parameters'])} is not a list of names"
            )
        if self.use_dora and self._parameters:
            raise InputError(f"{file}: target_parameters with use_dora: PEFT has no DoRA of experts")
        self._alphas = {k: self._number("alpha_pattern", v) for k, v in self._pattern(content, "alpha_pattern")}
        self._ranks = {k: self._whole("rank_pattern", v) for k, v in self._pattern(content, "rank_pattern")}

    @property
    def largest_rank(self) -> int:
        """Largest rank that the configuration names, for servers that want to know it beforehand."""
        return max([self._rank or 0, *self._ranks.values()])

    def parameters_of(self, module: str) -> list[str]:
        """Returns the names of the parameters of `module` that are adapted, in PEFT's order of nesting, inmost first.

        PEFT wraps the parameters in the order in which the module has them, which no file records.

        Raises:
            InputError: There are several, and not those whose order is known.
        """
        found = set()
        for target in self._parameters:
            owner, _, parameter = target.rpartition(".")
            if not owner or module == owner or module.endswith(f".{owner}"):
                found.add(parameter)
        if len(found) > 1 and not found <= set(_EXPERTS):
            raise InputError(f"{self.file}: target_parameters: several of {module}, in an unknown order")
        return sorted(found, key=lambda name: _EXPERTS.index(name) if name in _EXPERTS else 0)

    def puts_on(self, module: str) -> bool:
        """True if PEFT would adapt `module`, judged by lists of names only."""
        return (not self._targets or _is_among(module, self._targets)) and not _is_among(module, self._excluded)

    def require_names(self) -> None:
        """Rejects patterns that are not plain module names, since PEFT would match them without a timeout.

        Raises:
            InputError: A pattern is not a plain name.
        """
        for name, pattern in (("alpha_pattern", self._alphas), ("rank_pattern", self._ranks)):
            for key in pattern:
                if not regex.fullmatch(r"[\w.]+", key):
                    raise InputError(f"{self.file}: {name}: {_short(key)} is not a module name")

    def rank(self, module: str) -> int | None:
        """Returns the rank of `module`; None if the file does not give it."""
        return self._of_module("rank_pattern", self._ranks, module, self._rank)

    def scale(self, module: str, rank: int) -> float:
        """Returns the scale of B·A: alpha / rank, or alpha / √rank with rsLoRA."""
        alpha = self._of_module("alpha_pattern", self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._rslora else rank)

    def _refuse_variants(self, content: Mapping[str, Any]) -> None:
        for name, value in content.items():
            if (
                name in _WITHOUT_EFFECT
                or name in _READ
                or any(type(value) is type(off) and value == off for off in _OFF)
            ):
                continue
            if name not in _WHY and value == _default(name):
                continue
            why = _WHY.get(name, "unknown field, perhaps of a newer PEFT")
            raise InputError(f"{self.file}: {_short(name)}={_short(value)}: {why}")
        initialisation = content.get("init_lora_weights", True)
        if initialisation is None or isinstance(initialisation, bool):
            return
        if not isinstance(initialisation, str) or initialisation.lower() not in _INITIALISATIONS:
            raise InputError(
                f"{self.file}: init_lora_weights={_short(initialisation)} may also change the base; convert the "
                "adapter to plain LoRA"
            )

    def _names(self, content: Mapping[str, Any], name: str) -> list[str]:
        """Returns a list of names; empty for a regular expression, where the names of the weights decide."""
        value = content.get(name)
        names = value if isinstance(value, list) else []
        if not isinstance(value, (str, list, type(None))) or not all(isinstance(item, str) for item in names):
            raise InputError(f"{self.file}: {name}: {_short(value)} is not a list of names")
        return names

    def _pattern(self, content: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
        pattern = content.get(name) or {}
        if not isinstance(pattern, dict):
            raise InputError(f"{self.file}: {name} is not a mapping")
        for key in pattern:
            try:
                compile_pattern(_whole_name(key))
            except ValueError as error:
                raise InputError(
                    f"{self.file}: {name}: {_short(key)} is not a valid regular expression ({first_line(error)})"
                ) from error
        return list(pattern.items())

    def _of_module(self, name: str, pattern: Mapping[str, _Value], module: str, default: _Value) -> _Value:
        """Looks up a module by PEFT's rule: the first key that matches its name or the end of it."""
        for key, value in pattern.items():
            try:
                if regex.match(_whole_name(key), module, timeout=_SECONDS):
                    return value
            except TimeoutError as error:
                raise InputError(f"{self.file}: {name}: {_short(key)} takes too long to match") from error
        return default

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
            raise InputError(f"{self.file}: {name}: {_short(value)} is not a finite number usable as a scale")
        return float(value)

    def _whole(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{self.file}: {name}: {_short(value)} is not a rank (a whole number of 1 or more)")
        return value

    def _switch(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise InputError(f"{self.file}: {name}: {_short(value)} is neither true nor false")
        return value


def _default(name: str) -> Any:
    """Returns the installed PEFT's default of a field; NaN, which equals nothing, if there is none or no PEFT."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:  # adapters can be read without PEFT
        return math.nan

    for field in dataclasses.fields(LoraConfig):
        if field.name == name and field.default is not dataclasses.MISSING:
            return field.default
    return math.nan


def _whole_name(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _is_among(module: str, names: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
