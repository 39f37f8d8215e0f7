"""Reference log-probabilities: the base scores frozen rollouts once, for all runs that need the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from losslens.core.files import atomic_file
from losslens.core.hashing import hash_json
from losslens.core.locks import file_lock
from losslens.training.batches import sequences

# Increased when the same tokens start to get different values.
_VERSION = 2
# Tokens per forward pass, padding included. Fixed rather than adapted to free memory: the composition of a batch
# affects rounding, and the values must not depend on the machine that computes them.
_BATCH_TOKENS, _BATCH_TOKENS_ON_CUDA = 1 << 11, 1 << 14
# Tokens between two saves of partial results.
_SAVE_TOKENS = 1 << 20

# Prompt and completion of each rollout.
TokenIds = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class ReferenceCache:
    """Cache of log-probabilities under the base, keyed by everything that determines them.

    The key hashes the content of the base, its precision and device, and the token ids, which already reflect
    rollouts, tokenizer and chat template. Interrupted scoring resumes from the last save.

    Attributes:
        folder: Folder of the cache.
        about: Fingerprint of the base, its precision and its device.
    """

    folder: Path
    about: Mapping[str, Any]

    def logps(
        self, tokenised: pd.DataFrame, score: Callable[[dict[str, torch.Tensor]], torch.Tensor], pad_token_id: int
    ) -> tuple[list[np.ndarray], Path]:
        """Returns the log-probabilities of each rollout's completion tokens (nats, float32), and the file they are in.

        Args:
            tokenised: The rollouts to score, from `tokenise`.
            score: Computes the base's log-probabilities, shape (N, T), of a batch from `sequences`.
            pad_token_id: Padding token of the inputs.
        """
        token_ids = list(zip(tokenised["prompt_ids"], tokenised["completion_ids"], strict=True))
        file = (
            self.folder
            / hash_json({"version": _VERSION, **self.about, "tokens": _hash(token_ids)}, 16)
            / "logps.safetensors"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        # The first token of a sequence has no probability.
        lengths = np.array([max(len(completion) - (not prompt), 0) for prompt, completion in token_ids])
        with file_lock(file.with_suffix(".lock")):
            logps = _read(file, lengths)
            todo = [batch for batch in self._batches(token_ids) if any(np.isnan(logps[row]).any() for row in batch)]
            if todo:
                _score(token_ids, todo, logps, file, lambda batch: score(sequences(batch, pad_token_id)))
        return logps, file

    def _batches(self, token_ids: TokenIds) -> list[list[int]]:
        """Row numbers of the rollouts in each batch: of similar length, the longest first."""
        max_tokens = _BATCH_TOKENS_ON_CUDA if self.about.get("device") == "cuda" else _BATCH_TOKENS
        order = sorted(range(len(token_ids)), key=lambda row: (-len(token_ids[row][0]) - len(token_ids[row][1]), row))
        batches: list[list[int]] = []
        while order:
            longest = len(token_ids[order[0]][0]) + len(token_ids[order[0]][1])
            size = max(max_tokens // max(longest, 1), 1)
            batches.append(order[:size])
            order = order[size:]
        return batches


def _score(
    token_ids: TokenIds,
    todo: list[list[int]],
    logps: list[np.ndarray],
    file: Path,
    score: Callable[[TokenIds], torch.Tensor],
) -> None:
    unsaved = 0
    total = sum(map(len, todo))
    with tqdm(total=total, desc="scoring the rollouts with the base", unit="rollout", leave=False) as bar:
        for number, rows in enumerate(todo, 1):
            batch = score([token_ids[row] for row in rows]).float().cpu().numpy()
            for row, values in zip(rows, batch, strict=True):
                start = max(len(token_ids[row][0]) - 1, 0)
                logps[row][:] = values[start : start + len(logps[row])]
            bar.update(len(rows))
            unsaved += batch.size
            if unsaved >= _SAVE_TOKENS or number == len(todo):
                _write(file, logps)
                unsaved = 0


def _hash(token_ids: TokenIds) -> str:
    digest = hashlib.sha256()
    for prompt_and_completion in token_ids:
        for ids in prompt_and_completion:
            digest.update(np.array([len(ids), *ids], dtype="<i8").tobytes())
    return digest.hexdigest()


def _read(file: Path, lengths: np.ndarray) -> list[np.ndarray]:
    """Saved log-probabilities, NaN where missing; all NaN if there is no file or it is damaged."""
    values = np.full(int(lengths.sum()), np.nan, dtype=np.float32)
    try:
        with safe_open(file, "np") as content:
            saved = content.get_tensor("logps")
            if saved.shape == values.shape and content.metadata() == {"sha256": _sha256(file, saved)}:
                values = saved
    except (OSError, SafetensorError, ValueError):
        pass
    return np.split(values, np.cumsum(lengths)[:-1])


def _write(file: Path, logps: list[np.ndarray]) -> None:
    values = np.concatenate(logps)
    with atomic_file(file) as temporary:
        save_file({"logps": values}, temporary, {"sha256": _sha256(file, values)})


def _sha256(file: Path, values: np.ndarray) -> str:
    """Hash of the values and of their key, so that the file of other rollouts, or another base, is not taken for it."""
    return hashlib.sha256(file.parent.name.encode() + values.astype("<f4").tobytes()).hexdigest()
