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

from losslens.core.files import atomic_file
from losslens.core.hashing import hash_json
from losslens.training.batches import sequences

# Raised when the same tokens begin to get other numbers.
_VERSION = 1
# Tokens, with the padding, that are scored at once. Not what the run has room for: which rollouts are scored together
# moves the numbers by rounding, and they are to be the same whoever scores them.
_AT_ONCE, _AT_ONCE_ON_CUDA = 1 << 11, 1 << 14
# After how many the numbers so far are kept.
_A_SAVE = 1 << 20

Both = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class ReferenceCache:
    """Log-probabilities under the base, in a folder named after all that decides them.

    These are the content of the base, its precision and device, and the tokens themselves: what rollouts, tokenizer
    and chat template come down to. Who is killed while he scores goes on.

    Attributes:
        folder: Of all of them.
        about: What tells the base, its precision and device from others.
    """

    folder: Path
    about: Mapping[str, Any]

    def logps(
        self, tokenised: pd.DataFrame, score: Callable[[dict[str, torch.Tensor]], torch.Tensor], pad_token_id: int
    ) -> tuple[list[np.ndarray], Path]:
        """The log-probability of each completion token of each rollout, nats, float32, and the file they are kept in.

        Args:
            tokenised: All rollouts, from `tokenise`.
            score: Gives the base's log-probabilities, shape (N, T), of what `sequences` gives.
            pad_token_id: What fills up sequences.
        """
        both = list(zip(tokenised["prompt_ids"], tokenised["completion_ids"], strict=True))
        file = (
            self.folder
            / hash_json({"version": _VERSION, **self.about, "tokens": _hash(both)}, 16)
            / "logps.safetensors"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        # A first token with nothing before it has no probability.
        lengths = np.array([max(len(completion) - (not prompt), 0) for prompt, completion in both])
        with FileLock(file.with_suffix(".lock")):
            known = _read(file, lengths)
            todo = [chunk for chunk in self._chunks(both) if any(np.isnan(known[row]).any() for row in chunk)]
            if todo:
                _score(both, todo, known, file, lambda found: score(sequences(found, pad_token_id)))
        return known, file

    def _chunks(self, both: Both) -> list[list[int]]:
        """Places of rollouts that are scored together: of like length, the longest first."""
        room = _AT_ONCE_ON_CUDA if self.about.get("device") == "cuda" else _AT_ONCE
        order = sorted(range(len(both)), key=lambda row: (-len(both[row][0]) - len(both[row][1]), row))
        chunks: list[list[int]] = []
        while order:
            longest = len(both[order[0]][0]) + len(both[order[0]][1])
            number = max(room // max(longest, 1), 1)
            chunks.append(order[:number])
            order = order[number:]
        return chunks


def _score(
    both: Both, todo: list[list[int]], known: list[np.ndarray], file: Path, score: Callable[[Both], torch.Tensor]
) -> None:
    unsaved = 0
    total = sum(map(len, todo))
    with tqdm(total=total, desc="the base scores the rollouts, once", unit="rollout", leave=False) as bar:
        for number, rows in enumerate(todo, 1):
            found = score([both[row] for row in rows]).float().cpu().numpy()
            for row, values in zip(rows, found, strict=True):
                start = max(len(both[row][0]) - 1, 0)
                known[row][:] = values[start : start + len(known[row])]
            bar.update(len(rows))
            unsaved += found.size
            if unsaved >= _A_SAVE or number == len(todo):
                _write(file, known)
                unsaved = 0


def _hash(both: Both) -> str:
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
