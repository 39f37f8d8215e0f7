"""`optim.micro_batch=auto`: falls back to smaller micro-batches with the same result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from losslens.config.training import Optim
from losslens.rollouts.frozen import freeze
from tests.conftest import OPTIM, ROOT, command, script


@pytest.mark.parametrize(
    ("micro_batch", "checkpointing", "ways"),
    [
        ("auto", "auto", [(6, False), (3, False), (2, False), (1, False), (6, True), (3, True), (2, True), (1, True)]),
        ("auto", True, [(6, True), (3, True), (2, True), (1, True)]),
        (3, "auto", [(3, False), (3, True)]),
        (2, False, [(2, False)]),
    ],
)
def test_the_fastest_plan_is_tried_first(
    micro_batch: int | str, checkpointing: bool | str, ways: list[tuple[int, bool]]
) -> None:
    optim = Optim(**{**OPTIM, "batch_size": 6, "micro_batch": micro_batch, "gradient_checkpointing": checkpointing})
    assert optim.microbatch_plans() == ways


# Runs train.py in a process whose address space ends `sys.argv[1]` MiB above what torch and the model take.
LIMITED = """
import resource, runpy, sys
headroom = int(sys.argv.pop(1)) << 20
import torch, transformers, trl, peft, wandb, datasets
torch.set_num_threads(1)
from losslens.training import run
train = run._train
def limited(*arguments):
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + headroom, resource.RLIM_INFINITY))
    try:
        return train(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run._train = limited
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_out_of_memory_falls_back_to_a_smaller_micro_batch(rollouts: pd.DataFrame, tmp_path: Path) -> None:
    """Real allocations that really fail: the whole batch of long rows does not fit into 280 MiB, a part of it does."""
    long = rollouts.assign(completion=[" ".join([text] * 8) for text in rollouts["completion"]])
    frozen = freeze(long, tmp_path / "given", "long", {})
    line = [
        f"rollouts.path={frozen}",
        "data.eval_size=2",
        "optim.max_steps=2",
        "optim.warmup_ratio=0",
        "optim.batch_size=32",
        "logger=none",
    ]
    line += ["optim.save_steps=1", "optim.log_steps=1"]
    arguments = command(tmp_path / "limited", *line)[1:]
    outcome = subprocess.run(
        [sys.executable, "-c", LIMITED, "280", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert "out of memory with a micro-batch of 32; trying 16" in outcome.stdout
    script(*command(tmp_path / "whole", *line))
    [limited], [whole] = ((tmp_path / name).glob("main/sft-*") for name in ("limited", "whole"))
    assert limited.name == whole.name
    facts = {run: json.loads((run / "manifest.json").read_text())["training"] for run in (limited, whole)}
    assert facts[whole]["micro_batch"] == 32
    assert facts[limited]["micro_batch"] < 32
    # Not entry by entry: Adam's first steps are of one size, also where a gradient is but rounding.
    files = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (limited, whole))
    ours, theirs = (torch.cat([file[name].flatten() for name in sorted(file) if "lora_B" in name]) for file in files)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    steps = [json.loads(entry)["step"] for entry in (limited / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
