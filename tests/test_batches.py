"""How batches are laid out: whose completion stands in for another's, and what a batch of one prompt is told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from losslens.errors import InputError
from losslens.losses.kto import Kto
from losslens.training.batches import Examples

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
    rows = examples.in_order(np.arange(5), 5, mismatched=True)
    assert [row for [row] in rows["mismatched"]] == [4, 4, 1, 1, 3]
    batch = examples.laid_out(list(rows), pad_token_id=0)
    assert batch["mismatched/input_ids"].tolist() == [[1, 14], [1, 14], [2, 11], [2, 11], [3, 13]]
    assert batch["input_ids"].tolist() == [[1, 10], [1, 11], [2, 12], [2, 13], [3, 14]]


def test_each_step_is_a_ring_of_its_own() -> None:
    rows = Examples(TABLE, Kto(name="kto")).in_order(np.array([0, 2, 4, 1]), 2, mismatched=True)
    assert [row for [row] in rows["mismatched"]] == [2, 0, 1, 4]


@pytest.mark.parametrize(("order", "batch_size"), [([0, 1], 2), ([0, 2, 4], 1)])
def test_a_step_of_one_prompt_is_refused(order: list[int], batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"^optim\.batch_size={batch_size}: all rollouts of a step answer one prompt"):
        Examples(TABLE, Kto(name="kto")).in_order(np.array(order), batch_size, mismatched=True)
