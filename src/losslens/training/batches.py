"""One tokenised set of rollouts for all losses, the one order in which they meet it, and the batches laid out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from losslens.config import TrainOn
from losslens.errors import InputError
from losslens.losses import Loss
from losslens.losses.pairs import mixed_pairs
from losslens.tokens import read_rollouts


def filter_rollouts(rollouts: pd.DataFrame, train_on: TrainOn) -> pd.DataFrame:
    """The rollouts that losses may learn from, in their order.

    Args:
        rollouts: All of them.
        train_on: `all`; `mixed_groups`, those of the prompts that have a right and a wrong rollout, which DPO can use;
            or `dpo_rows`, the first right and the first wrong rollout of each of these: its pairs.

    Raises:
        InputError: There are none.
    """
    if train_on == "all":
        return rollouts
    pairs = mixed_pairs(rollouts, "one" if train_on == "dpo_rows" else "all", f"train_on={train_on}")
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
    """What a loss learns from: each example is a rollout, or a pair of them.

    Args:
        tokenised: All rollouts, from `tokenise`.
        loss: The loss.
        train_on: See `filter_rollouts`.

    Attributes:
        table: The rollouts that the loss selects.
        rows: The rollouts of each example by their places in `table`, shape (examples, 1), or (examples, 2) for pairs:
            chosen and rejected.
        reference: The base's log-probability of each completion token, nats, of each rollout of `table` that is in an
            example; None where nobody has scored them.

    Raises:
        InputError: There is nothing in them to learn from.
    """

    def __init__(self, tokenised: pd.DataFrame, loss: Loss, train_on: TrainOn = "all") -> None:
        self.table = loss.select(filter_rollouts(tokenised, train_on))
        self.columns = loss.columns(self.table)
        pairs = loss.unit == "pair"
        self.rows = np.array(loss.select_pairs(self.table)) if pairs else np.arange(len(self.table))[:, None]
        self.reference: Sequence[np.ndarray] | None = None
        self._prompts, self._completions = list(self.table["prompt_ids"]), list(self.table["completion_ids"])
        self._rewards = self.table["reward"].to_numpy(np.float32)
        self._groups = self.table["group"].to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def in_order(self, order: np.ndarray, batch_size: int, mismatched: bool) -> Dataset:
        """The examples as they are met: the places of their rollouts in `table`.

        `rows` are an example's own; `mismatched`, if asked for, those of the last example before it in its batch that
        answers another prompt, the batch being a ring.

        Args:
            order: Numbers of examples, whole batches of them.
            batch_size: Examples that make one step.
            mismatched: Whether to add `mismatched`.

        Raises:
            InputError: A batch answers one prompt only.
        """
        columns = {"rows": self.rows[order]}
        if mismatched:
            others = [
                _of_another_prompt(batch, self._groups[self.rows[:, 0]]) for batch in order.reshape(-1, batch_size)
            ]
            columns["mismatched"] = self.rows[np.concatenate(others)]
        return Dataset.from_dict(columns)

    def laid_out(self, examples: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
        """A batch for the trainer: the first rollout of each example, then the second of each (TRL's order).

        Args:
            examples: Rows of `in_order`.
            pad_token_id: What fills up sequences.
        """
        rows = np.array([example["rows"] for example in examples]).T.reshape(-1)
        batch = self._sequences(rows, rows, pad_token_id)
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
        if "mismatched" in examples[0]:
            others = np.array([example["mismatched"] for example in examples]).T.reshape(-1)
            laid = self._sequences(rows, others, pad_token_id)
            batch |= {f"mismatched/{name}": values for name, values in laid.items()}
        return batch

    def _sequences(self, prompts: np.ndarray, completions: np.ndarray, pad_token_id: int) -> dict[str, torch.Tensor]:
        both = [(self._prompts[p], self._completions[c]) for p, c in zip(prompts, completions, strict=True)]
        return sequences(both, pad_token_id)


def _of_another_prompt(batch: np.ndarray, groups: np.ndarray) -> list[int]:
    """Of each example of a batch the last one before it whose group is another."""
    found = []
    for place, example in enumerate(batch):
        before = np.roll(batch, -place)[::-1]
        others = before[groups[before] != groups[example]]
        if not len(others):
            raise InputError(
                f"optim.batch_size={len(batch)}: all rollouts of a step answer one prompt, and the loss compares them "
                "with those of others; make it larger"
            )
        found.append(int(others[0]))
    return found


def sequences(both: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels` and `attention_mask` of prompts and their completions, each of shape (N, T + 1)."""
    return {
        "input_ids": _padded([[*prompt, *completion] for prompt, completion in both], pad_token_id),
        "labels": _padded([[*[-100] * len(prompt), *completion] for prompt, completion in both], -100),
        "attention_mask": _padded([[1] * (len(prompt) + len(completion)) for prompt, completion in both], 0),
    }


def _padded(rows: Sequence[list[int]], filling: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filling)


def data_order(rows: int, examples: int, seed: int) -> np.ndarray:
    """Which row is met when: `examples` row numbers, each epoch a new permutation drawn from (`seed`, epoch).

    It depends on the number of rows alone, so all losses that train on the same rows meet them in the same order,
    and every batch is full.
    """
    epochs = -(-examples // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[:examples]
