"""What runs and losses are called on the page; nothing else makes up a name, so that all of it says the same."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from losslens.tables.format import rate, whole
from losslens.tables.style import loss_title

# Characters of a name that stands beside a row or over a column.
_LONGEST = 24


def loss_name(method: str, learning_rate: float, settings: str) -> str:
    """`DPO 1e-3 beta=0.3`: a loss in full; a rate that is not known is left out."""
    known = "" if pd.isna(learning_rate) else rate(learning_rate)
    return " ".join(part for part in (loss_title(method), known, short(settings)) if part)


def run_name(run: pd.Series, inits: bool, whole_name: bool = False) -> str:
    """`1 DPO 1e-3 β=0.3 s0`: a run by its number, as short as tells it from the others.

    Args:
        run: A row of `runs.csv`, `label` included, and its number.
        inits: Whether runs differ in their `init_seed`.
        whole_name: Whether there is room for however long a name.
    """
    if pd.isna(run["learning_rate"]) and pd.isna(run["seed"]):  # an adapter made elsewhere
        name = run["run"]
    else:
        known = "" if pd.isna(run["learning_rate"]) else rate(run["learning_rate"])
        name = " ".join(part for part in (loss_title(run["method"]), known, setting_text(run)) if part)
    seeds = "" if pd.isna(run["seed"]) else f" s{whole(run['seed'])}"
    init = f" A{whole(run['init_seed'])}" if inits and not pd.isna(run["init_seed"]) else ""
    return f"{run['number']} {name if whole_name else cut(name)}{seeds}{init}"


def setting_text(run: pd.Series) -> str:
    """`β=0.3`: the settings, but for rate and seeds, that tell a run from the others of its method, by its `label`."""
    told = run["label"].removeprefix(run["method"]) if run["label"] != run["run"] else ""
    return " ".join(re.sub(r"(?<!\S)(?:lr \S+|s\d+|init \d+)(?!\S)", " ", told).split())


def short(settings: str) -> str:
    """`beta=0.3` of `method.beta=0.3`."""
    return re.sub(r"(?:\w+\.)+(?=\w+=)", "", settings)


def cut(name: str) -> str:
    """A long name, each of its long words without its middle; of a setting the value stays."""
    words = name.split(" ")
    room = _LONGEST - len(words) + 1
    widths: dict[int, int] = {}
    for place in sorted(range(len(words)), key=lambda place: len(words[place])):
        widths[place] = min(len(words[place]), (room - sum(widths.values())) // (len(words) - len(widths)))
    if len(name) <= _LONGEST:
        return name
    if any(widths[place] < min(len(word), 6) for place, word in enumerate(words)):  # too many to tell each
        return _without_middle(name, _LONGEST)
    return " ".join(_without_middle(word, widths[place]) for place, word in enumerate(words))


def all_cut(names: Sequence[str]) -> list[str]:
    """Names, the long ones short; those that would be the same then are numbered."""
    numbers: dict[str, dict[str, int]] = {}
    found = []
    for name in names:
        brief = cut(name)
        alike = numbers.setdefault(brief, {})
        number = alike.setdefault(name, len(alike) + 1)
        found.append(f"{brief} ({number})" if number > 1 else brief)
    return found


def _without_middle(word: str, width: int) -> str:
    if len(word) <= width:
        return word
    key, _, value = word.rpartition("=")
    end = len(value) + 1 if key and len(value) + 4 <= width else width // 2
    return f"{word[: width - end - 1]}…{word[-end:]}"
