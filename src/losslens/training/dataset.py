"""One tokenised set of rollouts for all methods, and the one order in which they meet it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from losslens.config import TrainOn
from losslens.errors import InputError
from losslens.methods import Method, Pairwise, Pointwise
from losslens.methods.dpo import Dpo
from losslens.tokens import read_rollouts


def usable(rollouts: pd.DataFrame, train_on: TrainOn) -> pd.DataFrame:
    """The rollouts that methods may learn from, in their order.

    Args:
        rollouts: All of them.
        train_on: `all`; `mixed_groups`, those of the prompts that have a right and a wrong rollout, which DPO can use;
            or `dpo_rows`, the first right and the first wrong rollout of each of these: its pairs.

    Raises:
        InputError: There are none.
    """
    if train_on == "all":
        return rollouts
    pairs = Dpo(name="dpo", pairs="one" if train_on == "dpo_rows" else "all")
    try:
        rows = {row for pair in pairs.pair_rows(rollouts) for row in pair}
    except InputError as error:
        raise InputError(f"train_on={train_on}: no prompt has both a right and a wrong rollout") from error
    return rollouts.iloc[sorted(rows)]


def row_count(tokenised: pd.DataFrame, method: Method) -> int:
    """Rows (or pairs) in one epoch of `method`."""
    return len(method.pair_rows(tokenised) if isinstance(method, Pairwise) else method.rows(tokenised))  # type: ignore


def tokenise(rollouts: pd.DataFrame, tokenizer: Any, manifest: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The rollouts with `prompt_ids`, `completion_ids` and the number of their `group` (their prompt) beside them.

    Args:
        rollouts: As they are frozen.
        tokenizer: Of the base.
        manifest: Of the frozen rollouts: whose tokens their ids are.
    """
    prompts, completions = read_rollouts(rollouts, tokenizer, manifest)
    return rollouts.assign(
        prompt_ids=pd.Series(prompts, index=rollouts.index, dtype=object),
        completion_ids=pd.Series(completions, index=rollouts.index, dtype=object),
        group=pd.factorize(rollouts["problem_id"])[0],
    )


def pointwise_dataset(tokenised: pd.DataFrame, method: Pointwise) -> Dataset:
    """One row a rollout that `method` learns from: `input_ids`, `labels` and what the loss needs."""
    rows = method.rows(tokenised)
    advantages = method.advantages(rows["reward"].to_numpy(), rows["group"].to_numpy())
    columns = (rows["prompt_ids"], rows["completion_ids"], rows["reward"], advantages, rows["group"])
    return Dataset.from_list(
        [
            {
                "input_ids": prompt + completion,
                "labels": [-100] * len(prompt) + completion,
                "reward": reward,
                "advantage": float(advantage),
                "group": group,
            }
            for prompt, completion, reward, advantage, group in zip(*columns, strict=True)
        ]
    )


def pairwise_dataset(tokenised: pd.DataFrame, method: Pairwise) -> Dataset:
    """One row a pair: `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    prompts, completions = list(tokenised["prompt_ids"]), list(tokenised["completion_ids"])
    return Dataset.from_list(
        [
            {"prompt_ids": prompts[right], "chosen_ids": completions[right], "rejected_ids": completions[wrong]}
            for right, wrong in method.pair_rows(tokenised)
        ]
    )


def schedule(rows: int, examples: int, seed: int) -> np.ndarray:
    """Which row is met when: `examples` row numbers, each epoch a new permutation drawn from (`seed`, epoch).

    It depends on the number of rows alone, so all methods that train on the same rows meet them in the same order,
    and every batch is full.
    """
    epochs = -(-examples // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[:examples]


def in_order(dataset: Dataset, order: Sequence[int] | np.ndarray) -> Dataset:
    """`dataset` with its rows as `order` says, some of them several times."""
    return dataset.select(order)
