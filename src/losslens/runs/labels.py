"""Short labels of runs, made of the settings in which they differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from losslens.core.mappings import flatten

_METHOD = ("method.name", "format")
_SEEDS = {"seed": "s", "init_seed": "init "}
# Prefixes of the settings to prefer in labels, in this order.
_PREFERRED = (
    "method.", "adapter", "learning_rate", "lora.r", "lora.", "train_on", "optim.", "rollouts.", "dtype", "base.",
)  # fmt: skip
_SYMBOLS = {"beta": "β=", "learning_rate": "lr ", "r": "r"}
_HASH = re.compile(r"[0-9a-f]{16,}")


def labels(identities: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns a unique label for each run: its method, and the settings in which it differs from others of its method.

    If any two runs differ in a seed, it is part of all labels, since every pair is read by the seeds it shares.

    Args:
        identities: Identity of each run with all options (`settings_of`), by its name.
    """
    flat = {name: flatten(identity) for name, identity in identities.items()}
    chosen = _distinguishing_keys(flat)
    # Full fine-tuning has no init_seed, which does not make it a difference of the others.
    seeds = [key for key in _SEEDS if len({repr(values[key]) for values in flat.values() if key in values}) > 1]
    by_name = {}
    for name, values in flat.items():
        method = str(values.get("method.name", name))
        same_method = [other for other in flat.values() if other.get("method.name") == values.get("method.name")]
        settings = [
            _setting(key, values[key], chosen)
            for key in chosen
            if key in values and len({repr(other.get(key)) for other in same_method}) > 1
        ]
        seed_parts = [f"{_SEEDS[key]}{values[key]}" for key in seeds if key in values]
        by_name[name] = " ".join([method, *settings, *seed_parts])
    # Labels that are still equal, as for the same run in two sweeps, get the end of the run's name.
    taken = list(by_name.values())
    return {name: label if taken.count(label) == 1 else f"{label} ({name[-20:]})" for name, label in by_name.items()}


def _distinguishing_keys(flat: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys that distinguish runs which agree in method, seeds and all keys chosen before."""
    keys = {key for values in flat.values() for key in values} - {*_METHOD, *_SEEDS}
    seeds = [key for key in _SEEDS if all(key in values for values in flat.values())]
    chosen: list[str] = []
    for key in sorted(keys, key=lambda key: _sort_key(key, flat)):
        groups: dict[str, set[str]] = {}
        for values in flat.values():
            group_key = repr([values.get(k) for k in ("method.name", *seeds, *chosen)])
            groups.setdefault(group_key, set()).add(repr(values.get(key)))
        if any(len(group) > 1 for group in groups.values()):
            chosen.append(key)
    return chosen


def _sort_key(key: str, flat: Mapping[str, Mapping[str, Any]]) -> tuple[bool, int, str]:
    is_hash = any(_HASH.fullmatch(str(values.get(key))) for values in flat.values())
    rank = next((number for number, prefix in enumerate(_PREFERRED) if key.startswith(prefix)), len(_PREFERRED))
    return is_hash, rank, key


def _setting(key: str, value: Any, chosen: list[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    if leaf == "sha256":
        leaf = parent.rpartition(".")[2] or leaf
    if [other.rpartition(".")[2] for other in chosen].count(leaf) > 1:
        leaf = key
    return f"{_SYMBOLS.get(leaf, f'{leaf} ')}{_format(value)}"


def _format(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, list):
        return "+".join(map(_format, value)) if len(value) < 4 else f"{_format(value[0])}+{len(value) - 1}"
    text = str(value)
    return text[:8] if _HASH.fullmatch(text) else text if len(text) <= 24 else f"{text[:23]}…"
