"""How batches are laid out: whose completion stands in for another's, and what a batch of one prompt is told."""

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

# Prompts 0, 0, 1, 1, 2: the second rollout of a prompt must not meet the first one's completion.
TABLE = pd.DataFrame(
    {
        "prompt_ids": [[1], [1], [2], [2], [3]],
        "completion_ids": [[10], [11], [12], [13], [14]],
        "reward": [1.0, 0.0, 1.0, 0.0, 1.0],
        "group": [0, 0, 1, 1, 2],
    }
)


def test_a_mismatched_completion_is_the_last_one_before_of_another_prompt() -> None:
    """In a ring: before 0 and 1 comes 4, before 2 and 3 comes 1, before 4 comes 3."""
    examples = Examples(TABLE, Kto(name="kto"))
    others = examples.take(examples.mismatched())
    assert [row for [row] in others.rows] == [4, 4, 1, 1, 3]
    mismatched = examples.with_completions_of(others, pad_token_id=0)
    assert mismatched["input_ids"].tolist() == [[1, 14], [1, 14], [2, 11], [2, 11], [3, 13]]
    assert examples.laid_out(pad_token_id=0)["input_ids"].tolist() == [[1, 10], [1, 11], [2, 12], [2, 13], [3, 14]]


def test_each_step_is_a_ring_of_its_own() -> None:
    examples = Examples(TABLE, Kto(name="kto"))
    assert [examples.take(np.array(step)).mismatched().tolist() for step in ([0, 2], [4, 1])] == [[1, 0], [1, 0]]


@pytest.mark.parametrize("step", [[0, 1], [0]])
def test_a_step_of_one_prompt_is_refused(step: list[int]) -> None:
    with pytest.raises(InputError, match=rf"^optim\.batch_size={len(step)}: all rollouts of a step answer one prompt"):
        Examples(TABLE, Kto(name="kto")).take(np.array(step)).mismatched()


def test_a_frozen_source_refuses_it_before_the_first_step() -> None:
    with pytest.raises(InputError, match=r"^optim\.batch_size=1: all rollouts of a step answer one prompt"):
        FrozenSource(TABLE, Kto(name="kto"), Optim(**{**OPTIM, "batch_size": 1}), seed=0)
    FrozenSource(TABLE, Kto(name="kto"), Optim(**{**OPTIM, "batch_size": 4}), seed=0)
