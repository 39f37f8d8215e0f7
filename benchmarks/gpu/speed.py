"""Tokens per second and peak memory of SFT, DPO and GRPO at Qwen3-4B's shapes: ours, and stock TRL.

Both train on the same rows in the same order, with the largest micro-batch that fits, without gradient checkpointing
if possible. Tokens are those of prompts and completions, without padding. The first step is not counted. The base's
log-probabilities, which DPO needs, are scored before it by ours and in every step by TRL.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from transformers import TrainerCallback

from benchmarks.gpu.results import Speed
from benchmarks.gpu.setting import Setting, lora, optim, synchronise
from benchmarks.stock import stock_trainer
from losslens.core.errors import first_line
from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.losses.sft import Sft
from losslens.models.adapters import initial_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.training.reference import ReferenceCache
from losslens.training.run import TrainingPlan, make_trainer
from losslens.training.source import FrozenSource

# FLOPs of a token per parameter: 2 forward and 2 for the gradients of activations. Those of frozen weights, 2 more,
# are not computed.
FLOPS_PER_PARAMETER = 4
FLOPS = f"{FLOPS_PER_PARAMETER} · parameters · tokens (LoRA), without attention"
LOSSES = {"sft": Sft(name="sft"), "dpo": Dpo(name="dpo"), "grpo": Grpo(name="grpo")}
STEPS = 3  # measured, after one that is not
_SIGMA = 0.7  # of log-normal lengths
_SHORTEST = 16  # tokens
_PROMPT = 0.125  # share of a row's tokens, at most 64


def matmul_rate(setting: Setting) -> float:
    """Measures the device's rate of matrix products in the precision of training, in FLOP/s."""
    size = setting.matmul
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronise(setting)
        started = time.perf_counter()
        for _ in range(10):
            _ = a @ b
        synchronise(setting)
        seconds.append((time.perf_counter() - started) / 10)
    return 2 * size**3 / median(seconds[1:])


def log_normal_lengths(rows: int, mean: float, longest: int) -> np.ndarray:
    """Draws lengths in tokens, σ = 0.7, of the given mean before those above `longest` are cut; shape (rows,)."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA, rows)
    cut: np.ndarray = np.clip(drawn, _SHORTEST, longest).astype(int)
    return cut


def random_rollouts(lengths: np.ndarray, vocab_size: int) -> pd.DataFrame:
    """Returns rollouts of random tokens in the layout of `tokenise`: a correct and an incorrect one of each prompt.

    Args:
        lengths: Tokens of each rollout, prompt included; an even number of them.
        vocab_size: Size of the vocabulary.
    """
    draw = np.random.default_rng(0)
    rows = []
    for number, pair in enumerate(lengths.reshape(-1, 2)):
        prompt = draw.integers(vocab_size, size=min(64, int(pair.min() * _PROMPT))).tolist()
        for sample, length in enumerate(pair):
            completion = draw.integers(vocab_size, size=length - len(prompt)).tolist()
            facts = {"problem_id": str(number), "group": number, "reward": float(1 - sample), "place": len(rows)}
            rows.append({**facts, "prompt_ids": prompt, "completion_ids": completion})
    return pd.DataFrame(rows)


@dataclass
class Track:
    """Measures the trainers, one after the other, on one model.

    Attributes:
        setting: Device and sizes.
        base: The model.
        rate: The device's matmul rate, FLOP/s.
        folder: Folder for files.
        deadline: End of all measurements, on the clock of `time.monotonic`.
    """

    setting: Setting
    base: LoadedModel
    rate: float
    folder: Path
    deadline: float

    def __post_init__(self) -> None:
        self._start = initial_adapter(self.folder, {}, self.base.model, lora(self.setting.rank), init_seed=0)
        self._too_large: set[tuple[str, str, bool, int]] = set()

    def measure(self, report: Callable[[str], None]) -> list[Speed]:
        """Measures all losses, lengths and trainers, the most telling first; `report` is told what comes next."""
        cells = [(n, loss, who) for n in self.setting.lengths for loss in LOSSES for who in ("ours", "stock TRL")]
        speeds = []
        for number, (lengths, loss, who) in enumerate(cells):
            left = self.deadline - time.monotonic()
            if left <= 0:
                speeds.append(Speed(loss, lengths, who, note="out of time"))
                continue
            report(f"{loss}, {lengths} tokens, {who}")
            try:
                speeds.append(self._cell(loss, lengths, who, time.monotonic() + left / (len(cells) - number)))
            except Exception as error:  # one trainer that fails must not take the other figures with it
                speeds.append(Speed(loss, lengths, who, note=f"{type(error).__name__}: {first_line(error)}"))
            release_memory()
        return speeds

    def _cell(self, loss: str, lengths: str, who: str, end: float) -> Speed:
        """Measures one trainer with the largest micro-batch that fits; no step begins after `end`, save the second."""
        unit = 2 if loss == "dpo" else 1  # rows of an example
        rows = self.setting.rows[lengths]
        fixed, (mean, longest) = self.setting.lengths[lengths], self.setting.log_normal
        total = rows * (1 + STEPS)
        sizes = log_normal_lengths(total, mean, longest) if fixed is None else np.full(total, fixed)
        table = random_rollouts(sizes, self.base.model.config.vocab_size)
        settings = optim(rows // unit, 1 + STEPS)
        plan = TrainingPlan(LOSSES[loss], 1e-5, lora(self.setting.rank), self._start, settings, seed=0)
        for micro_batch, checkpointing in settings.microbatch_plans():
            key = (who, lengths, checkpointing)
            if any(key == each[:3] and micro_batch * unit >= each[3] for each in self._too_large):
                continue
            try:
                return self._timed(plan, table, who, lengths, (micro_batch, checkpointing), end)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
            # Outside the `except` block, whose traceback keeps the tensors alive.
            release_memory()
            self._too_large.add((*key, micro_batch * unit))
        return Speed(loss, lengths, who, note="out of memory")

    def _timed(
        self, plan: TrainingPlan, table: pd.DataFrame, who: str, lengths: str, shape: tuple[int, bool], end: float
    ) -> Speed:
        cache = ReferenceCache(self.folder / "references", {"device": self.setting.device, "lengths": lengths})
        source = FrozenSource(table, plan.method, plan.optim, plan.seed, reference=cache)  # type: ignore[arg-type]
        clock, folder = _Clock(self.setting, end), self.folder / "run"
        AcceleratorState._reset_state(reset_partial_state=True)
        if self.setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with preserved(self.base.model):
            started = time.perf_counter()
            if who == "ours":
                trainer = make_trainer(plan, self.base, source, folder, [], microbatch_plan=shape)
            else:
                trainer = stock_trainer(plan, self.base, table, folder, shape)
            synchronise(self.setting)
            prepared = time.perf_counter() - started
            trainer.add_callback(clock)
            trainer.train()
        tokens = sum(_tokens(source, table, step) for step in range(1, len(clock.ends)))
        rate = tokens / (clock.ends[-1] - clock.ends[0])
        parameters = self.base.model.num_parameters()
        return Speed(
            loss=plan.method.name,
            lengths=lengths,
            trainer=who,
            tokens_per_second=rate,
            peak_bytes=torch.cuda.max_memory_allocated() if self.setting.device == "cuda" else None,
            utilisation=FLOPS_PER_PARAMETER * parameters * rate / self.rate,
            rows=shape[0],
            checkpointing=shape[1],
            steps=len(clock.ends) - 1,
            prepared=prepared,
        )


class _Clock(TrainerCallback):
    """Records the time at the end of each step, and ends training after `end`, but not before the second step's end."""

    def __init__(self, setting: Setting, end: float) -> None:
        self.setting, self.end = setting, end
        self.ends: list[float] = []

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> Any:
        synchronise(self.setting)
        self.ends.append(time.perf_counter())
        if len(self.ends) > 1 and time.monotonic() > self.end:
            control.should_training_stop = True
        return control


def _tokens(source: FrozenSource, table: pd.DataFrame, step: int) -> int:
    """Tokens of a step's rows, without padding."""
    examples = source.batch(step, policy=None)  # type: ignore[arg-type]
    places = examples.table["place"].to_numpy()[examples.rows.reshape(-1)]
    lengths = table["prompt_ids"].map(len).to_numpy() + table["completion_ids"].map(len).to_numpy()
    return int(lengths[places].sum())
