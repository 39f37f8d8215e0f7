"""Displayed names of runs and losses, made here only so that the whole page uses the same ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from losslens.tables.format import rate, whole
from losslens.tables.style import loss_title

# Most characters of a name that heads a row or a column.
_LONGEST = 24


def loss_name(method: str, learning_rate: float, settings: str) -> str:
    """Returns the full name of a loss, such as `DPO 1e-3 beta=0.3`; an unknown learning rate is left out."""
    known = "" if pd.isna(learning_rate) else rate(learning_rate)
    return " ".join(part for part in (loss_title(method), known, short(settings)) if part)


def run_name(run: pd.Series, inits: bool, whole_name: bool = False) -> str:
    """Returns the short name of a run, such as `1 DPO 1e-3 β=0.3 s0`, unique by its number.

    Args:
        run: A row of `runs.csv`, including `label`, and the run's number.
        inits: True if the runs differ in `init_seed`.
        whole_name: True if the name may have any length.
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
    """Returns the settings in a run's `label` apart from learning rate and seeds, such as `β=0.3`."""
    settings = run["label"].removeprefix(run["method"]) if run["label"] != run["run"] else ""
    return " ".join(re.sub(r"(?<!\S)(?:lr \S+|s\d+|init \d+)(?!\S)", " ", settings).split())


def short(settings: str) -> str:
    """Drops config groups from settings: `method.beta=0.3` becomes `beta=0.3`."""
    return re.sub(r"(?:\w+\.)+(?=\w+=)", "", settings)


def cut(name: str) -> str:
    """Shortens a long name by cutting the middle of its long words; the value of a setting is kept."""
    words = name.split(" ")
    room = _LONGEST - len(words) + 1
    widths: dict[int, int] = {}
    for place in sorted(range(len(words)), key=lambda place: len(words[place])):
        widths[place] = min(len(words[place]), (room - sum(widths.values())) // (len(words) - len(widths)))
    if len(name) <= _LONGEST:
        return name
    if any(widths[place] < min(len(word), 6) for place, word in enumerate(words)):  # too many words to shorten each
        return _without_middle(name, _LONGEST)
    return " ".join(_without_middle(word, widths[place]) for place, word in enumerate(words))


def all_cut(names: Sequence[str]) -> list[str]:
    """Shortens the long names; names that become the same are numbered."""
    numbers: dict[str, dict[str, int]] = {}
    shortened = []
    for name in names:
        brief = cut(name)
        same_brief = numbers.setdefault(brief, {})
        number = same_brief.setdefault(name, len(same_brief) + 1)
        shortened.append(f"{brief} ({number})" if number > 1 else brief)
    return shortened


def _without_middle(word: str, width: int) -> str:
    if len(word) <= width:
        return word
    key, _, value = word.rpartition("=")
    end = len(value) + 1 if key and len(value) + 4 <= width else width // 2
    return f"{word[: width - end - 1]}…{word[-end:]}"
