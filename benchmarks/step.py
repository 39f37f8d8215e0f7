"""Time per step of DPO on the embedded model: as trained, padded, with the reference in the step, and in stock TRL.

The variants take turns in one process, so that load on the machine affects all of them; the median step counts. On the
CPU it is the processor's time, over all threads. On CUDA in bfloat16, with the language-model head that training uses
there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from losslens.config.training import Optim
from losslens.losses.dpo import Dpo
from losslens.models.adapters import LoraSettings, initial_adapter
from losslens.models.loading import ModelSource, load_model, preserved
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.training.batches import tokenise
from losslens.training.reference import ReferenceCache
from losslens.training.run import TrainingPlan, make_trainer
from losslens.training.source import FrozenSource

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.stock import stock_trainer  # noqa: E402
from tools import pretrain  # noqa: E402

STEPS, BATCH = 12, 32


class Clock(TrainerCallback):
    """Records the duration of each step in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.now = time.perf_counter if torch.cuda.is_available() else time.process_time

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(self.now() - self.started)


def rollouts() -> pd.DataFrame:
    """Returns a correct and an incorrect worked solution of each of 64 problems."""
    rows = []
    for problem in ReasoningGym("chain_sum", pretrain.DIFFICULTY, pretrain_share=pretrain.SHARE).problems(
        "train", 64, 3
    ):
        text = pretrain.worked_solution(problem)
        for reward, completion in ((1.0, text), (0.0, text.replace(problem.answer, f"{int(problem.answer) + 1}"))):
            facts = {"problem_id": problem.id, "prompt": problem.prompt, "prompt_text": None, "answer": problem.answer}
            rows.append({**facts, "completion": completion, "reward": reward, "finished": True})
    return pd.DataFrame(rows)


def main() -> None:
    """Prints the table of timings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default=str(ROOT / "src" / "losslens" / "tiny" / "student"))
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    source = ModelSource(
        "model",
        options.model,
        None,
        "bfloat16" if cuda else "float32",
        "cuda" if cuda else "cpu",
        trust_remote_code=False,
    )
    base = load_model(source)
    table = tokenise(rollouts(), base.tokenizer)
    lora = LoraSettings(8, 16.0, 0.0, ("k_proj", "o_proj", "q_proj", "v_proj"))
    optim = Optim(
        max_steps=STEPS, epochs=None, batch_size=BATCH, micro_batch="auto", scheduler="cosine", warmup_ratio=0.05,
        weight_decay=0.01, max_grad_norm=1.0, gradient_checkpointing=False, log_steps=STEPS, save_steps=1000 * STEPS,
        snapshot_steps=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = TrainingPlan(
            Dpo(name="dpo"), 1e-4, lora, initial_adapter(folder, {}, base.model, lora, init_seed=0), optim, seed=0
        )
        cached = FrozenSource(table, plan.method, optim, seed=0, reference=ReferenceCache(folder / "references", {}))
        uncached = FrozenSource(table, plan.method, optim, seed=0)
        variants = {
            "as trained": lambda: make_trainer(plan, base, cached, folder / "cached", []),
            "with padding": lambda: make_trainer(plan, base, cached, folder / "padded", [], packed=False),
            "reference in the step": lambda: make_trainer(plan, base, uncached, folder / "uncached", []),
            "stock TRL": lambda: stock_trainer(plan, base, table, folder / "stock"),
        }
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        for _ in range(options.turns):
            for variant, make in variants.items():
                AcceleratorState._reset_state(reset_partial_state=True)
                clock = Clock()
                with preserved(base.model):
                    trainer = make()
                    trainer.add_callback(clock)
                    trainer.train()
                seconds[variant] += clock.seconds[2:]
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    device = torch.cuda.get_device_name() if cuda else "CPU"
    print(device, f"{torch.get_num_threads()} threads", Path(options.model).name)
    for variant, value in medians.items():
        print(f"{variant:<24} {1000 * value:9.1f} ms  {value / medians['stock TRL']:.2f}")


if __name__ == "__main__":
    main()
