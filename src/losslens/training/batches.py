"""One tokenised set of rollouts for all losses, what each learns from in it, and the batches laid out of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from losslens.config.training import TrainOn
from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.losses.pairs import mixed_pairs
from losslens.models.tokens import read_rollouts


def filter_rollouts(rollouts: pd.DataFrame, train_on: TrainOn) -> pd.DataFrame:
    """The rollouts that losses may learn from, in their order.

    Args:
        rollouts: All of them.
        train_on: `all`; `mixed_groups`, those of the prompts that have a right and a wrong rollout, which DPO can use;
            or `paired_rollouts`, the first right and the first wrong rollout of each of these: its pairs.

    Raises:
        InputError: There are none.
    """
    if train_on == "all":
        return rollouts
    pairs = mixed_pairs(rollouts, "one" if train_on == "paired_rollouts" else "all", f"train_on={train_on}")
    return rollouts.iloc[sorted({row for pair in pairs for row in pair})]


def tokenise(rollouts: pd.DataFrame, tokenizer: Any, manifest: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """The rollouts with `prompt_ids`, `completion_ids`, their `place` and the number of their `group` (their prompt).

    Args:
        rollouts: As they are frozen.
        tokenizer: Of the base.
        manifest: Of the frozen rollouts: whose tokens their ids are.
    """
    prompts, completions = read_rollouts(rollouts, tokenizer, manifest)
    return rollouts.assign(
        prompt_ids=pd.Series(prompts, index=rollouts.index, dtype=object),
        completion_ids=pd.Series(completions, index=rollouts.index, dtype=object),
        place=np.arange(len(rollouts)),
        group=pd.factorize(rollouts["problem_id"])[0],
    )


class Examples:
    """Rollouts as a loss learns from them: each example is a rollout, or a pair of them.

    Args:
        rollouts: Whole groups of them, from `tokenise`.
        loss: The loss.

    Attributes:
        table: The rollouts that the loss selects.
        columns: What the loss computes from whole groups, each of shape (rollouts of `table`,).
        rows: The rollouts of each example by their places in `table`, shape (examples, 1), or (examples, 2) for pairs:
            chosen and rejected.
        reference: The base's log-probability of each completion token, nats, of each rollout of `table` that is in an
            example; None where nobody has scored them.

    Raises:
        InputError: There is nothing in them to learn from.
    """

    def __init__(self, rollouts: pd.DataFrame, loss: Loss) -> None:
        self.table = loss.select(rollouts)
        self.columns = loss.columns(self.table)
        pairs = loss.unit == "pair"
        self.rows = np.array(loss.select_pairs(self.table)) if pairs else np.arange(len(self.table))[:, None]
        self.reference: Sequence[np.ndarray] | None = None
        self._prompts, self._completions = list(self.table["prompt_ids"]), list(self.table["completion_ids"])
        self._rewards = self.table["reward"].to_numpy(np.float32)
        self._groups = self.table["group"].to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: np.ndarray) -> Examples:
        """Those with these numbers, in this order; what was computed from whole groups stays."""
        taken = copy(self)
        taken.rows = self.rows[numbers]
        return taken

    def mismatched(self) -> np.ndarray:
        """The number of the last example before each one that answers another prompt, all being a ring.

        Raises:
            InputError: All answer one prompt.
        """
        groups = self._groups[self.rows[:, 0]].tolist()
        if len(set(groups)) == 1:
            raise InputError(
                f"optim.batch_size={len(groups)}: all rollouts of a step answer one prompt, and the loss compares them "
                "with those of others; make it larger"
            )
        before = range(-1, -len(groups), -1)
        found = [next(i + k for k in before if groups[i + k] != group) for i, group in enumerate(groups)]
        return np.array(found) % len(groups)

    def laid_out(self, pad_token_id: int) -> dict[str, Any]:
        """A batch of them for the trainer: the first rollout of each, then the second of each (TRL's order).

        Args:
            pad_token_id: What fills up sequences.
        """
        rows = self.rows.T.reshape(-1)
        batch: dict[str, Any] = self.with_completions_of(self, pad_token_id)
        batch["reward"] = torch.from_numpy(self._rewards[rows])
        for name, values in self.columns.items():
            batch[f"columns/{name}"] = torch.tensor(values[rows], dtype=torch.float32)
        if self.rows.shape[1] == 2:
            batch["pairs"] = torch.arange(len(rows)).reshape(2, -1).T
        if self.reference is not None:
            batch["reference"] = torch.zeros(len(rows), batch["input_ids"].shape[1] - 1)
            for place, row in enumerate(rows):
                start, values = max(len(self._prompts[row]) - 1, 0), self.reference[row]
                batch["reference"][place, start : start + len(values)] = torch.from_numpy(values)
        return batch

    def with_completions_of(self, others: Examples, pad_token_id: int) -> dict[str, torch.Tensor]:
        """The `sequences` of their prompts and the completions of as many `others` of the same table."""
        rows = zip(self.rows.T.reshape(-1), others.rows.T.reshape(-1), strict=True)
        return sequences([(self._prompts[p], self._completions[c]) for p, c in rows], pad_token_id)


def sequences(both: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `attention_mask` of prompts and their completions, each of shape (N, T + 1)."""
    return {
        "input_ids": _padded([[*prompt, *completion] for prompt, completion in both], pad_token_id),
        "labels": _padded([[*[-100] * len(prompt), *completion] for prompt, completion in both], -100),
        "attention_mask": _padded([[1] * (len(prompt) + len(completion)) for prompt, completion in both], 0),
    }


def _padded(rows: Sequence[list[int]], filling: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filling)
