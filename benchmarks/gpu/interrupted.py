"""A short run of DPO on the embedded student, which kills itself with SIGKILL when it is started as a program.

python -m benchmarks.gpu.interrupted FOLDER DEVICE
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.setting import lora, optim, student
from benchmarks.step import rollouts
from losslens.losses.dpo import Dpo
from losslens.models.adapters import initial_adapter
from losslens.training.batches import tokenise
from losslens.training.reference import ReferenceCache
from losslens.training.run import TrainingPlan, train_run
from losslens.training.source import FrozenSource

STEPS, SAVE_STEPS, KILL_STEP = 6, 2, 5


def train(folder: Path, device: str, kill_step: int | None = None) -> dict[str, Any]:
    """Trains from the last checkpoint in the folder, or from the start; returns the facts of `train_run`.

    Args:
        folder: The run's folder.
        device: Type of the device.
        kill_step: Step at whose end the process kills itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = student(device, "float32")
    table = tokenise(rollouts().head(32), base.tokenizer)
    start = initial_adapter(folder.parent, {}, base.model, lora(4), init_seed=0)
    settings = optim(8, STEPS, save_steps=SAVE_STEPS)
    plan = TrainingPlan(Dpo(name="dpo"), 1e-3, lora(4), start, settings, seed=0, identity="interrupted")
    reference = ReferenceCache(folder.parent / "references", {"device": device})
    source = FrozenSource(table, plan.method, settings, plan.seed, reference=reference)  # type: ignore[arg-type]

    def kill(step: int, metrics: dict[str, float]) -> None:
        if step == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)

    return train_run(plan, base, source, folder, kill)


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], KILL_STEP)
