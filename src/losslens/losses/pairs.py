"""Pairs of a correct and an incorrect rollout of one prompt."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from losslens.errors import InputError

Pairs = Literal["one", "all"]


def mixed_pairs(rollouts: pd.DataFrame, pairs: Pairs) -> list[tuple[int, int]]:
    """Positions in `rollouts` of the correct and the incorrect one of each pair.

    Args:
        rollouts: With `problem_id` and `reward`.
        pairs: `one` takes the first correct and the first incorrect rollout of each prompt that has both; `all` takes
            every correct × incorrect pair.

    Raises:
        InputError: No prompt has both.
    """
    positions = pd.Series(np.arange(len(rollouts)), index=rollouts.index)
    found = []
    for _, group in rollouts.groupby("problem_id", sort=False):
        correct = positions[group.index[group["reward"] > 0]]
        incorrect = positions[group.index[group["reward"] <= 0]]
        found += [(int(w), int(l)) for w in correct for l in incorrect][: 1 if pairs == "one" else None]
    if not found:
        raise InputError("no prompt has both a right and a wrong rollout (no mixed group)")
    return found
