"""Collation of batches, and mismatched completions for KTO."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslens.config.training import Optim
from losslens.core.errors import InputError
from losslens.losses.kto import Kto
from losslens.training.batches import Examples
from losslens.training.source import FrozenSource
from tests.conftest import OPTIM

pytestmark = pytest.mark.fast

# Prompts 0, 0, 1, 1, 2: the second rollout of a prompt must not meet the first one's completion.
TABLE = pd.DataFrame(
    {
        "prompt_ids": [[1], [1], [2], [2], [3]],
        "completion_ids": [[10], [11], [12], [13], [14]],
        "reward": [1.0, 0.0, 1.0, 0.0, 1.0],
        "group": [0, 0, 1, 1, 2],
    }
)


def test_mismatched_completion_is_the_last_preceding_one_of_another_prompt() -> None:
    """In a ring: before 0 and 1 comes 4, before 2 and 3 comes 1, before 4 comes 3."""
    examples = Examples(TABLE, Kto(name="kto"))
    others = examples.take(examples.mismatched())
    assert [row for [row] in others.rows] == [4, 4, 1, 1, 3]
    mismatched = examples.with_completions_of(others, pad_token_id=0)
    assert mismatched["input_ids"].tolist() == [[1, 14], [1, 14], [2, 11], [2, 11], [3, 13]]
    assert examples.collate(pad_token_id=0)["input_ids"].tolist() == [[1, 10], [1, 11], [2, 12], [2, 13], [3, 14]]


def test_mismatched_wraps_around_within_a_step() -> None:
    examples = Examples(TABLE, Kto(name="kto"))
    assert [examples.take(np.array(step)).mismatched().tolist() for step in ([0, 2], [4, 1])] == [[1, 0], [1, 0]]


@pytest.mark.parametrize("step", [[0, 1], [0]])
def test_refuses_a_step_with_one_prompt(step: list[int]) -> None:
    with pytest.raises(
        InputError, match=rf"^optim\.batch_size={len(step)}: all rollouts of a step have the same prompt"
    ):
        Examples(TABLE, Kto(name="kto")).take(np.array(step)).mismatched()


def test_frozen_source_refuses_such_a_step_before_training() -> None:
    with pytest.raises(InputError, match=r"^optim\.batch_size=1: all rollouts of a step have the same prompt"):
        FrozenSource(TABLE, Kto(name="kto"), Optim(**{**OPTIM, "batch_size": 1}), seed=0)
    FrozenSource(TABLE, Kto(name="kto"), Optim(**{**OPTIM, "batch_size": 4}), seed=0)
