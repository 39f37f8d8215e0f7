"""Tokenised rollouts shared by all losses, the examples each loss takes from them, and their collation into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence

from losslens.config.training import TrainOn
from losslens.core.errors import InputError
from losslens.losses import Batch, Loss, Need
from losslens.losses.pairs import mixed_pairs
from losslens.rollouts.frozen import LOGPS, FrozenRollouts
from losslens.rollouts.token_ids import read_rollouts

# Column of the rollouts that a need of a loss is read from.
_SAMPLER_COLUMNS: dict[Need, str] = {"sampler": "sampler_logps", "sampler_raw": "sampler_raw_logps"}


def filter_rollouts(rollouts: pd.DataFrame, train_on: TrainOn) -> pd.DataFrame:
    """Returns the rollouts that losses may train on, in their original order.

    Args:
        rollouts: All rollouts.
        train_on: `all`; `mixed_groups`, the rollouts of prompts that have both a correct and an incorrect rollout,
            which are the ones DPO can use; or `paired_rollouts`, the first correct and the first incorrect rollout of
            each such prompt, which are DPO's pairs.
    """
    if train_on == "all":
        return rollouts
    pairs = mixed_pairs(rollouts, "one" if train_on == "paired_rollouts" else "all")
    return rollouts.iloc[sorted({row for pair in pairs for row in pair})]


def tokenise(rollouts: pd.DataFrame, tokenizer: Any, manifest: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Adds the columns `prompt_ids`, `completion_ids`, `place` (row number) and `group` (number of the prompt).

    The sampler's log-probabilities are kept in the rows that are trained on with exactly the recorded token ids, and
    None in the others: a text that is encoded anew, with another tokenizer or end token, has other tokens.

    Args:
        rollouts: Frozen rollouts.
        tokenizer: Tokenizer of the base.
        manifest: Manifest of the frozen rollouts, which names the tokenizer of their token ids.
    """
    prompts, completions = read_rollouts(rollouts, tokenizer, manifest)
    recorded = _cells(rollouts, "completion_ids")
    unchanged = [ids is not None and list(ids) == own for ids, own in zip(recorded, completions, strict=True)]
    for name in LOGPS:
        logps = [values if same else None for values, same in zip(_cells(rollouts, name), unchanged, strict=True)]
        rollouts = rollouts.assign(**{name: pd.Series(logps, index=rollouts.index, dtype=object)})
    return rollouts.assign(
        prompt_ids=pd.Series(prompts, index=rollouts.index, dtype=object),
        completion_ids=pd.Series(completions, index=rollouts.index, dtype=object),
        place=np.arange(len(rollouts)),
        group=pd.factorize(rollouts["problem_id"])[0],
    )


@lru_cache(maxsize=1)
def tokenise_frozen(rollouts: FrozenRollouts, tokenizer: Any) -> pd.DataFrame:
    """Returns `tokenise` of frozen rollouts, once for all runs of a process that train on them one after the other."""
    return tokenise(rollouts.table, tokenizer, rollouts.manifest)


def _cells(table: pd.DataFrame, name: str) -> list[Any]:
    """Returns the lists in a column; None where one, or the column, is missing."""
    cells = table[name].tolist() if name in table else [None] * len(table)
    return [None if isinstance(cell, float) else cell for cell in cells]


class Examples:
    """Training examples of a loss: single rollouts, or pairs of rollouts.

    Args:
        rollouts: Output of `tokenise`, with whole groups.
        loss: The loss.
        train_on: Those that the loss may select from; see `filter_rollouts`.

    Attributes:
        table: The rollouts that the loss selects.
        columns: Output of `Loss.columns`, computed before any rollout is left out, each of shape (rows of `table`,).
        rows: Positions in `table` of the rollouts of each example, shape (examples, 1), or (examples, 2) for pairs:
            chosen and rejected.
        reference: The base's log-probability of each completion token, nats, for each row of `table`, None for rows
            that the run does not meet; None if they have not been scored.
        sampler: The log-probability of each completion token under the policy that sampled it, nats, for each row of
            `table`, None where unknown (`require_sampler`); None unless the loss needs it.
    """

    def __init__(self, rollouts: pd.DataFrame, loss: Loss, train_on: TrainOn = "all") -> None:
        # They travel with their rows, whatever is left out and in whatever order.
        columns = loss.columns(rollouts)
        rollouts = rollouts.assign(**{f"columns/{name}": values for name, values in columns.items()})
        self.table = loss.select(filter_rollouts(rollouts, train_on))
        self.columns = {name: self.table[f"columns/{name}"].to_numpy() for name in columns}
        if loss.unit == "pair":
            self.rows = np.array(loss.select_pairs(self.table), dtype=int).reshape(-1, 2)
        else:
            self.rows = np.arange(len(self.table))[:, None]
        self.reference: Sequence[np.ndarray | None] | None = None
        column = sampler_column(loss)
        self.sampler: Sequence[np.ndarray] | None = None if column is None else list(self.table[column])
        self._prompts, self._completions = list(self.table["prompt_ids"]), list(self.table["completion_ids"])
        self._rewards = self.table["reward"].to_numpy(np.float32)
        self._groups = self.table["group"].to_numpy()
        pairs = zip(self._prompts, self._completions, strict=True)
        self._lengths = np.array([len(prompt) + len(completion) for prompt, completion in pairs], dtype=int)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example's longest rollout, prompt included, shape (examples,)."""
        longest: np.ndarray = self._lengths[self.rows].max(axis=1)
        return longest

    def take(self, numbers: np.ndarray) -> Examples:
        """Returns the examples with these indices, in this order; columns stay those of the whole groups."""
        taken = copy(self)
        taken.rows = self.rows[numbers]
        return taken

    def mismatched(self) -> np.ndarray:
        """Returns for each example the index of the last preceding one with another prompt, cyclically.

        Raises:
            InputError: All examples have the same prompt.
        """
        groups = self._groups[self.rows[:, 0]].tolist()
        if len(set(groups)) == 1:
            raise InputError(
                f"optim.batch_size={len(groups)}: all rollouts of a step have the same prompt, but the loss needs "
                "rollouts of at least two prompts in each step; use a larger batch"
            )
        offsets = range(-1, -len(groups), -1)
        preceding = [next(i + k for k in offsets if groups[i + k] != group) for i, group in enumerate(groups)]
        return np.array(preceding) % len(groups)

    def collate(self, pad_token_id: int) -> dict[str, Any]:
        """Collates the examples into a batch: the first rollout of each, then the second of each (TRL's order).

        Args:
            pad_token_id: Padding token of the inputs.
        """
        rows = self.rows.T.reshape(-1)
        batch: dict[str, Any] = self.with_completions_of(self, pad_token_id)
        batch["reward"] = torch.from_numpy(self._rewards[rows])
        for name, values in self.columns.items():
            batch[f"columns/{name}"] = torch.tensor(values[rows], dtype=torch.float32)
        if self.rows.shape[1] == 2:
            batch["pairs"] = torch.arange(len(rows)).reshape(2, -1).T
        for name, logps in (("reference", self.reference), ("sampler", self.sampler)):
            if logps is None:
                continue
            batch[name] = torch.zeros(len(rows), batch["input_ids"].shape[1] - 1)
            for place, row in enumerate(rows):
                # The first token of a sequence is not scored, so with an empty prompt neither is the first of these.
                prompt, completion = len(self._prompts[row]), len(self._completions[row])
                start, scored = max(prompt - 1, 0), max(completion - (not prompt), 0)
                known = logps[row]
                assert known is not None
                values = known[len(known) - scored :]
                batch[name][place, start : start + scored] = torch.tensor(values, dtype=torch.float32)
        return batch

    def with_completions_of(self, others: Examples, pad_token_id: int) -> dict[str, torch.Tensor]:
        """Collates the prompts of these examples with the completions of as many `others` from the same table."""
        rows = zip(self.rows.T.reshape(-1), others.rows.T.reshape(-1), strict=True)
        return sequences([(self._prompts[p], self._completions[c]) for p, c in rows], pad_token_id)


def split_by_length(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Splits examples into parts of similar length, the longest first, whose largest has as few tokens as possible.

    Tokens are counted as if each part was padded to its longest example.

    Args:
        lengths: Tokens of each example, shape (examples,).
        parts: Number of parts, none of which is empty; at most the number of examples.

    Returns:
        Indices of the examples of each part, ascending.
    """
    order = np.argsort(-lengths, kind="stable")
    fewest, most = int(lengths[order[0]]), int(lengths[order[0]]) * len(order)
    while fewest < most:
        limit = (fewest + most) // 2
        if _parts_within(lengths[order], limit, parts) is None:
            fewest = limit + 1
        else:
            most = limit
    starts = _parts_within(lengths[order], most, parts)
    assert starts is not None
    return [np.sort(part) for part in np.split(order, starts[1:])]


def _parts_within(descending: np.ndarray, limit: int, parts: int) -> list[int] | None:
    """Starts of `parts` parts of at most `limit` padded tokens each; None if there are none."""
    starts = [0]
    for row in range(1, len(descending)):
        rows = row - starts[-1] + 1
        must_split = len(descending) - row == parts - len(starts)
        if must_split or rows * descending[starts[-1]] > limit:
            starts.append(row)
        if len(starts) > parts:
            return None
    return starts


def sampler_column(loss: Loss) -> str | None:
    """Returns the column of the sampler's log-probabilities that the loss needs; None if it needs none."""
    return next((column for need, column in _SAMPLER_COLUMNS.items() if need in loss.needs), None)


def require_sampler(examples: Examples, loss: Loss, rollouts: FrozenRollouts) -> None:
    """Checks that the sampler's log-probabilities are known for the rollouts of all examples, if the loss needs them.

    Args:
        examples: Examples of the loss, from `tokenise`d `rollouts`.
        loss: The loss.
        rollouts: The frozen rollouts, for the reason in the message.

    Raises:
        InputError: They are unknown for a rollout; the message says why, and what to do instead.
    """
    column = sampler_column(loss)
    if column is None:
        return
    rows = np.unique(examples.rows)
    unknown = [row for row in rows if examples.table[column].iloc[row] is None]
    if not unknown:
        return
    recorded = rollouts.table.iloc[examples.table["place"].iloc[unknown[0]]]
    if recorded["completion_ids"] is None:
        why = "only their text is known, not their token ids"
    elif recorded[column] is not None:
        why = "their token ids belong to a different tokenizer"
    elif recorded["sampler_raw_logps"] is not None:
        why = "their server reports only those at temperature 1 without truncation, and may have sampled otherwise"
    else:
        why = "none were recorded when they were sampled"
    which = "the rollouts" if len(unknown) == len(rows) else f"{len(unknown)} of {len(rows)} rollouts"
    other = recorded["sampler_raw_logps"] is not None and recorded[column] is None
    instead = "sampler_raw divides by these" if other else "base divides by the base's instead"
    instead = f"; method.behaviour={instead}" * ("behaviour" in type(loss).model_fields)
    raise InputError(
        f"method={loss.name}: {which} in {rollouts.folder} have no log-probabilities of the policy that sampled them"
        f" ({why}){instead}"
    )


def require_weights(examples: Examples, rollouts: pd.DataFrame, loss: Loss, train_on: TrainOn) -> None:
    """Checks that the loss moves something: that not every weight is 0 as long as the model is the base.

    Where all are, each step's gradient is 0, so the model stays the base and they stay 0. The weights are those of
    tokens of probabilities from .001 to .999 on which the base, the sampler and the model agree, with the examples'
    rewards and columns.

    Args:
        examples: Examples of the loss, made of `rollouts` and `train_on`.
        rollouts: All rollouts, for the reason in the message.
        loss: The loss.
        train_on: See `filter_rollouts`.

    Raises:
        InputError: Every weight is 0, or there are no examples; the message says why.
    """
    if len(examples) and _initial_weights(examples, loss).any():
        return
    correct = rollouts["reward"] > 0
    mixed = correct.groupby(rollouts["group"]).nunique() > 1
    if loss.uses_reward and loss.any_reward and (rollouts.groupby("group")["reward"].nunique() <= 1).all():
        why = "the rewards of each prompt are equal"
    elif not correct.any():
        why = f"none of the {len(correct)} rollouts is correct"
    elif correct.all():
        why = f"all {len(correct)} rollouts are correct"
    elif not mixed.any():
        why = "no prompt has both a correct and an incorrect rollout"
    elif not len(examples):
        why = "the loss selects none of them"
    else:
        why = "its options make every weight 0 while the model is the base"
    rows = "" if train_on == "all" else f" train_on={train_on}"
    raise InputError(f"method={loss.name}{rows}: nothing to learn from these rollouts: {why}")


def _initial_weights(examples: Examples, loss: Loss) -> torch.Tensor:
    """w_t of six tokens of each rollout of the examples, where model, base and sampler agree, shape (N, 6)."""
    rows = examples.rows.T.reshape(-1)
    lengths = torch.tensor([len(examples.table["completion_ids"].iloc[row]) for row in rows])
    likely = torch.tensor([0.999, 0.9, 0.7, 0.3, 0.1, 0.001])
    mask = (lengths > 0)[:, None].expand(-1, len(likely))
    base = likely.log().where(mask, 0.0)
    logps = base.clone().requires_grad_()
    batch = Batch(
        logps=logps,
        mask=mask,
        reward=torch.tensor(examples.table["reward"].to_numpy(np.float32)[rows]),
        columns={name: torch.tensor(values[rows], dtype=torch.float32) for name, values in examples.columns.items()},
        pairs=torch.arange(len(rows)).reshape(2, -1).T if examples.rows.shape[1] == 2 else None,
        reference=base,
        sampler=base,
        top_entropy=torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 4.0]).expand_as(base),
        divergence=torch.zeros_like(base),
        step={"mismatched_log_ratio": torch.zeros(())},
    )
    terms = loss.terms(batch)
    terms = terms.where(mask, 0.0) if loss.unit == "token" else terms
    [gradient] = torch.autograd.grad(terms.sum(), logps)
    return -gradient.where(mask, 0.0)


def sequences(token_ids: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Returns `input_ids`, `labels` and `attention_mask` of prompts and completions, each of shape (N, T + 1)."""
    return {
        "input_ids": _padded([[*prompt, *completion] for prompt, completion in token_ids], pad_token_id),
        "labels": _padded([[*[-100] * len(prompt), *completion] for prompt, completion in token_ids], -100),
        "attention_mask": _padded([[1] * (len(prompt) + len(completion)) for prompt, completion in token_ids], 0),
    }


def _padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
