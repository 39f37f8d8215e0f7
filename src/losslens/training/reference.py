"""What the base says of the frozen rollouts: scored once, and kept for all runs that need a reference."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from losslens.files import atomic_file, digest
from losslens.training.batches import sequences

# Raised when the same tokens begin to get other numbers.
_VERSION = 1
# After how many tokens, with the padding, the numbers so far are kept.
_A_SAVE = 1 << 20


@dataclass(frozen=True)
class ReferenceCache:
    """Log-probabilities under the base, in a folder named after all that decides them.

    These are the content of the base, its precision, and the tokens themselves: what rollouts, tokenizer and chat
    template come down to. Who is killed while he scores goes on.

    Attributes:
        folder: Of all of them.
        about: What tells the base and its precision from others.
    """

    folder: Path
    about: Mapping[str, Any]

    def logps(
        self,
        tokenised: pd.DataFrame,
        rows: np.ndarray,
        score: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        pad_token_id: int,
        at_once: int,
    ) -> list[np.ndarray]:
        """The log-probability of each completion token of each rollout, nats, float32; NaN where it is not known.

        Args:
            tokenised: All rollouts, from `tokenise`.
            rows: Places in it of those that are to be known.
            score: Gives the base's log-probabilities, shape (N, T), of what `sequences` gives.
            pad_token_id: What fills up sequences.
            at_once: N.
        """
        both = list(zip(tokenised["prompt_ids"], tokenised["completion_ids"], strict=True))
        file = (
            self.folder / digest({"version": _VERSION, **self.about, "tokens": _hash(both)}, 16) / "logps.safetensors"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        # A first token with nothing before it has no probability.
        lengths = np.array([len(completion) - (not prompt) for prompt, completion in both])
        with FileLock(file.with_suffix(".lock")):
            known = _read(file, lengths)
            todo = [row for row in np.unique(rows) if np.isnan(known[row]).any()]
            todo.sort(key=lambda row: -len(both[row][0]) - len(both[row][1]))
            if todo:
                _score(both, todo, known, file, lambda found: score(sequences(found, pad_token_id)), at_once)
        return known


def _score(
    both: list[tuple[list[int], list[int]]],
    todo: list[int],
    known: list[np.ndarray],
    file: Path,
    score: Callable[[list[tuple[list[int], list[int]]]], torch.Tensor],
    at_once: int,
) -> None:
    unsaved = 0
    with tqdm(total=len(todo), desc="the base scores the rollouts, once", unit="rollout", leave=False) as bar:
        while todo:
            rows, todo = todo[:at_once], todo[at_once:]
            found = score([both[row] for row in rows]).float().cpu().numpy()
            for row, values in zip(rows, found, strict=True):
                start = max(len(both[row][0]) - 1, 0)
                known[row][:] = values[start : start + len(known[row])]
            bar.update(len(rows))
            unsaved += found.size
            if unsaved >= _A_SAVE or not todo:
                _write(file, known)
                unsaved = 0


def _hash(both: list[tuple[list[int], list[int]]]) -> str:
    found = hashlib.sha256()
    for ids in both:
        for part in ids:
            found.update(np.array([len(part), *part], dtype="<i8").tobytes())
    return found.hexdigest()


def _read(file: Path, lengths: np.ndarray) -> list[np.ndarray]:
    """What is known, and NaN for the rest: for all where there is no such file, or it is damaged."""
    values = np.full(int(lengths.sum()), np.nan, dtype=np.float32)
    try:
        with safe_open(file, "np") as content:
            kept = content.get_tensor("logps")
            if kept.shape == values.shape and content.metadata() == {"sha256": _sha256(kept)}:
                values = kept
    except (OSError, SafetensorError, ValueError):
        pass
    return np.split(values, np.cumsum(lengths)[:-1])


def _write(file: Path, known: list[np.ndarray]) -> None:
    values = np.concatenate(known)
    with atomic_file(file) as temporary:
        save_file({"logps": values}, temporary, {"sha256": _sha256(values)})


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()
