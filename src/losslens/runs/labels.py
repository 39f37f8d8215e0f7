"""Short names of runs that say what tells them apart, and nothing that they share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_METHOD = ("method.name", "format")
_SEEDS = {"seed": "s", "init_seed": "init "}
# Where to look first for what tells two runs of one method apart.
_FIRST = ("method.", "learning_rate", "lora.r", "lora.", "train_on", "optim.", "rollouts.", "dtype", "base.")
_SYMBOLS = {"beta": "β=", "learning_rate": "lr ", "r": "r"}
_HASH = re.compile(r"[0-9a-f]{16,}")


def labels(identities: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A label for each run: its method, and the settings that tell it from the others of its method; no two alike.

    The seeds stand in all labels as soon as two runs differ in them: which runs share them matters for every pair.

    Args:
        identities: What decides each run (`losslens.config.identity.with_loss_options`), by its name.
    """
    flat = {name: dict(_flat(identity)) for name, identity in identities.items()}
    chosen = _telling(flat)
    seeds = [key for key in _SEEDS if len({repr(values.get(key)) for values in flat.values()}) > 1]
    found = {}
    for name, values in flat.items():
        method = str(values.get("method.name", name))
        alike = [other for other in flat.values() if other.get("method.name") == values.get("method.name")]
        settings = [
            _setting(key, values[key], chosen)
            for key in chosen
            if key in values and len({repr(other.get(key)) for other in alike}) > 1
        ]
        shown = [f"{_SEEDS[key]}{values[key]}" for key in seeds if key in values]
        found[name] = " ".join([method, *settings, *shown])
    # Those that are still alike, as one run in two sweeps, get the end of their names.
    all_labels = list(found.values())
    return {name: label if all_labels.count(label) == 1 else f"{label} ({name[-20:]})" for name, label in found.items()}


def _telling(flat: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys that tell runs apart which are alike by the keys before, seeds and methods given."""
    keys = {key for values in flat.values() for key in values} - {*_METHOD, *_SEEDS}
    chosen: list[str] = []
    for key in sorted(keys, key=lambda key: _place(key, flat)):
        groups: dict[str, set[str]] = {}
        for values in flat.values():
            alike = repr([values.get(k) for k in ("method.name", *_SEEDS, *chosen)])
            groups.setdefault(alike, set()).add(repr(values.get(key)))
        if any(len(group) > 1 for group in groups.values()):
            chosen.append(key)
    return chosen


def _place(key: str, flat: Mapping[str, Mapping[str, Any]]) -> tuple[bool, int, str]:
    hashed = any(_HASH.fullmatch(str(values.get(key))) for values in flat.values())
    place = next((number for number, start in enumerate(_FIRST) if key.startswith(start)), len(_FIRST))
    return hashed, place, key


def _setting(key: str, value: Any, chosen: list[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    if leaf == "sha256":
        leaf = parent.rpartition(".")[2] or leaf
    if [other.rpartition(".")[2] for other in chosen].count(leaf) > 1:
        leaf = key
    return f"{_SYMBOLS.get(leaf, f'{leaf} ')}{_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}".replace("e-0", "e-")
    if isinstance(value, list):
        return "+".join(map(_shown, value)) if len(value) < 4 else f"{_shown(value[0])}+{len(value) - 1}"
    text = str(value)
    return text[:8] if _HASH.fullmatch(text) else text if len(text) <= 24 else f"{text[:23]}…"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
