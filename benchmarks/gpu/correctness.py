"""Comparison of the device with float32 on the CPU and with stock TRL, and of runs that met trouble with others.

Gradients are those of a step's optimiser, captured before it moves: of the embedded student with an adapter that is not
0, so that ratios to the base are not 1.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import TrainerCallback

from benchmarks.full_size import ROOT
from benchmarks.gpu import interrupted
from benchmarks.gpu.results import Check, checked
from benchmarks.gpu.setting import lora, optim, student
from benchmarks.step import rollouts
from benchmarks.stock import stock_trainer
from losslens.losses import Loss, builtin_losses
from losslens.losses.dpo import Dpo
from losslens.losses.sft import Sft
from losslens.models.adapters import initial_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.sampling.local import generate_greedy
from losslens.training.batches import tokenise
from losslens.training.run import TrainingPlan, make_trainer, train_run
from losslens.training.source import FrozenSource

Gradient = dict[str, torch.Tensor]

# Largest relative difference of a gradient, ‖g − g′‖/‖g′‖, that counts as rounding.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
# Largest relative difference of an update that counts as rounding: Adam makes first steps of the size of its rate
# however small a gradient is.
_UPDATE_BOUND = 0.05
# Losses of which stock TRL has the same.
IN_TRL = ("sft", "dft", "dpo", "rpo", "kto")
# A greedy choice may be this much less likely on the CPU than its first choice there, in nats.
_TIE = 1e-2
# Mean difference of a token's log-probability that counts as rounding, in nats; for bfloat16 the trainer's own.
_LOGP_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
# Tokens of a completion in the search for a micro-batch, and rows in a step.
_LONG, _MANY = 1024, 32


class Bench:
    """The student in float32 on the CPU, and on the device in float32 and bfloat16, with one set of rollouts.

    Args:
        device: Type of the device.
        folder: Folder for files.
    """

    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.cpu = student("cpu", "float32")
        self.on_device = {dtype: student(device, dtype) for dtype in BOUNDS}
        table = rollouts().head(32)
        # Of unequal lengths, in pairs and between them.
        table["completion"] += [" = 0" * (number * 7 % 4) for number in range(len(table))]
        self.table = _with_sampler(tokenise(table, self.cpu.tokenizer))
        self.start = initial_adapter(folder, {}, self.cpu.model, lora(4), init_seed=0)

    def plan(self, loss: Loss, batch_size: int, **changes: Any) -> TrainingPlan:
        """Returns the plan of one step."""
        return TrainingPlan(loss, 1e-3, lora(4), self.start, optim(batch_size, 1, **changes), seed=0)

    def gradient(self, plan: TrainingPlan, base: LoadedModel, table: pd.DataFrame, **options: Any) -> Gradient:
        """Returns the gradient of our trainer's first step; `options` are those of `make_trainer`."""
        source = FrozenSource(table, plan.method, plan.optim, plan.seed)  # type: ignore[arg-type]
        return _first_gradient(lambda: make_trainer(plan, base, source, self.folder / "ours", [], **options), base)

    def stock_gradient(self, plan: TrainingPlan, base: LoadedModel, table: pd.DataFrame) -> Gradient:
        """Returns the gradient of stock TRL's first step."""
        return _first_gradient(lambda: stock_trainer(plan, base, table, self.folder / "stock"), base)

    def update(self, run: Path) -> Gradient:
        """Returns how far training has moved the tensors of a run's adapter."""
        start, end = (load_file(folder / "adapter_model.safetensors") for folder in (self.start, run / "adapter"))
        return {name: value.float() - start[name].float() for name, value in end.items()}


def all_checks(bench: Bench, names: list[str] | None = None) -> Iterator[tuple[str, Callable[[], Iterator[Check]]]]:
    """Yields what to check and the function that does; `names` are those of the losses, by default all."""
    losses = {name: kind(name=name) for name, kind in builtin_losses().items() if names is None or name in names}
    for name, loss in losses.items():
        yield f"{name} against the CPU", lambda loss=loss: against_cpu(bench, loss)  # type: ignore[misc]
    for name in (name for name in losses if name in IN_TRL):
        yield f"{name} against stock TRL", lambda loss=losses[name]: against_trl(bench, loss)  # type: ignore[misc]
    yield "rows alone", lambda: rows_alone(bench)
    yield "generation and scores", lambda: generated_and_scored(bench)
    if names is None:
        yield "resumption", lambda: resumed(bench)
        yield "micro-batch", lambda: micro_batch(bench)


def against_cpu(bench: Bench, loss: Loss) -> Iterator[Check]:
    """Compares a loss's gradient on the device, with the head that training uses on CUDA, with the CPU's."""
    plan = bench.plan(loss, 8)
    expected = bench.gradient(plan, bench.cpu, bench.table)
    for dtype, base in bench.on_device.items():
        found = bench.gradient(plan, base, bench.table, selected_head=False)
        yield checked(f"{loss.name} = float32 on the CPU", _on(bench, dtype), distance(found, expected), BOUNDS[dtype])


def against_trl(bench: Bench, loss: Loss) -> Iterator[Check]:
    """Compares a loss's gradient with stock TRL's, both on the device.

    TRL's likelihood of RPO is a mean over a micro-batch, so a step has one pair; its KTO lets a prompt meet another
    rollout of its own, so each has one.
    """
    table = bench.table
    if loss.name == "kto":
        table = table.iloc[[2 * pair + pair % 2 for pair in range(len(table) // 2)]]
    plan = bench.plan(loss, 1 if loss.name == "rpo" else 8)
    for dtype, base in bench.on_device.items():
        found = bench.gradient(plan, base, table, selected_head=False)
        expected = bench.stock_gradient(plan, base, table)
        yield checked(f"{loss.name} = stock TRL", _on(bench, dtype), distance(found, expected), BOUNDS[dtype])


def rows_alone(bench: Bench) -> Iterator[Check]:
    """Compares a batch of rows of unequal lengths with each row (or pair) by itself, which needs no padding."""
    for loss in (Sft(name="sft"), Dpo(name="dpo")):
        for dtype, base in bench.on_device.items():
            together = bench.gradient(bench.plan(loss, 8), base, bench.table)
            alone = bench.gradient(bench.plan(loss, 8, micro_batch=1), base, bench.table)
            name = f"{loss.name}: rows together = rows alone"
            yield checked(name, _on(bench, dtype), distance(together, alone), BOUNDS[dtype])


def generated_and_scored(bench: Bench) -> Iterator[Check]:
    """Scores the device's greedy completions on the CPU, and compares the probabilities of their tokens."""
    prompts = list(bench.table["prompt"].drop_duplicates())[:4]
    base = bench.on_device["float32"]
    completions = generate_greedy(base.model, base.tokenizer, prompts, max_new_tokens=24, batch_size=4)
    given = [list(ids) for ids in bench.table.drop_duplicates("problem_id")["prompt_ids"][:4]]
    rows = [(prompt, list(made.ids or ())) for prompt, made in zip(given, completions, strict=True)]
    logps = [_next_token_logps(bench.cpu, *row) for row in rows]
    gaps = [(each.max(-1).values - _of(each, ids)).max().item() for each, (_, ids) in zip(logps, rows, strict=True)]
    yield checked("greedy tokens are the CPU's first choice", _on(bench, "float32"), max(gaps), _TIE, "nats")
    for dtype, each in bench.on_device.items():
        differences = [
            (_of(_next_token_logps(each, *row), row[1]) - _of(expected, row[1])).abs()
            for row, expected in zip(rows, logps, strict=True)
        ]
        mean = torch.cat(differences).mean().item()
        yield checked("log-probabilities = the CPU's", _on(bench, dtype), mean, _LOGP_BOUNDS[dtype], "nats a token")


def resumed(bench: Bench) -> Iterator[Check]:
    """Kills a run with SIGKILL after a checkpoint, resumes it, and compares it with one that was left alone."""
    killed, whole = bench.folder / "killed", bench.folder / "whole"
    name = "resumed after SIGKILL = uninterrupted"
    command = [sys.executable, "-m", "benchmarks.gpu.interrupted", str(killed), bench.device]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=180)
    if process.returncode != -9:
        lines = process.stderr.strip().splitlines() or [""]
        yield Check(name, _on(bench, "float32"), "failed", note=f"exit status {process.returncode}: {lines[-1]}")
        return
    facts = interrupted.train(killed, bench.device)
    interrupted.train(whole, bench.device)
    if not facts["resumed_from"]:
        yield Check(name, _on(bench, "float32"), "failed", note="it started anew")
        return
    found, expected = bench.update(killed), bench.update(whole)
    same = all(torch.equal(found[key], expected[key]) for key in expected)
    note = f"from step {facts['resumed_from']}; {'byte-identical' if same else 'not byte-identical'}"
    yield checked(name, _on(bench, "float32"), distance(found, expected), _UPDATE_BOUND, note)


def micro_batch(bench: Bench) -> Iterator[Check]:
    """Occupies memory so that a whole batch does not fit, and compares what `optim.micro_batch=auto` then makes of it.

    The run must end with a smaller micro-batch and the same adapter.
    """
    name, on = "micro_batch=auto after out of memory", _on(bench, "float32")
    if bench.device != "cuda":
        yield Check(name, on, "skipped", note="needs a GPU, whose memory can be filled")
        return
    base = bench.on_device["float32"]
    table = _lengthened(bench.table, _LONG)
    plan = replace(bench.plan(Sft(name="sft"), _MANY), identity="micro-batch")
    _, least = _peak(bench, replace(plan, optim=optim(_MANY, 1, micro_batch=1)), base, table, "least")
    whole, most = _peak(bench, plan, base, table, "most")
    # Enough for about half a batch: what the cache holds is returned first.
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    room = (least + most) // 2
    if free <= room:
        yield Check(name, on, "skipped", note="too little memory is free")
        return
    occupied = torch.empty(free - room, dtype=torch.uint8, device="cuda")
    try:
        facts, _ = _peak(bench, plan, base, table, "squeezed")
    finally:
        del occupied
        torch.cuda.empty_cache()
    if facts["micro_batch"] >= whole["micro_batch"]:
        yield Check(name, on, "failed", note=f"the whole batch fitted into {room / 1e9:.1f} GB")
        return
    difference = distance(bench.update(bench.folder / "squeezed"), bench.update(bench.folder / "most"))
    yield checked(name, on, difference, _UPDATE_BOUND, f"{facts['micro_batch']} of {_MANY} rows")


def distance(found: Gradient, expected: Gradient) -> float:
    """Computes ‖g − g′‖/‖g′‖ over all tensors; infinite if their names differ or the second is 0."""
    if found.keys() != expected.keys():
        return float("inf")
    total = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    norm = sum(float(value.double().square().sum()) for value in expected.values())
    return float("inf") if norm == 0 else (total / norm) ** 0.5


class _Capture(TrainerCallback):
    """Copies the gradient of the first step."""

    def __init__(self) -> None:
        self.gradient: Gradient = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        named = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        self.gradient = {name: grad.detach().float().cpu().clone() for name, grad in named if grad is not None}


def _first_gradient(make: Callable[[], Any], base: LoadedModel) -> Gradient:
    AcceleratorState._reset_state(reset_partial_state=True)
    capture = _Capture()
    with preserved(base.model):
        trainer = make()
        _perturb(trainer.model)
        trainer.add_callback(capture)
        trainer.train()
    return capture.gradient


def _perturb(model: Any) -> None:
    """Gives the adapter, whose B is 0 at first, an update: the same on every device."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def _with_sampler(table: pd.DataFrame) -> pd.DataFrame:
    """Gives each completion token a log-probability under the policy that is said to have sampled it."""
    draw = np.random.default_rng(0)
    logps = pd.Series(
        [(-draw.exponential(0.3, len(ids))).tolist() for ids in table["completion_ids"]], table.index, dtype=object
    )
    return table.assign(sampler_logps=logps, sampler_raw_logps=logps)


def _lengthened(table: pd.DataFrame, tokens: int) -> pd.DataFrame:
    repeated = [(list(ids) * tokens)[:tokens] for ids in table["completion_ids"]]
    return table.assign(completion_ids=pd.Series(repeated, table.index, dtype=object))


def _peak(
    bench: Bench, plan: TrainingPlan, base: LoadedModel, table: pd.DataFrame, name: str
) -> tuple[dict[str, Any], int]:
    """Trains in a folder of that name; returns the facts, and the bytes reserved beyond those from before."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    folder = bench.folder / name
    folder.mkdir()
    source = FrozenSource(table, plan.method, plan.optim, plan.seed)  # type: ignore[arg-type]
    facts = train_run(plan, base, source, folder, lambda step, values: None)
    return facts, torch.cuda.max_memory_reserved() - before


@torch.no_grad()
def _next_token_logps(base: LoadedModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens at the completion's places, shape (len(completion), V), float32 on the CPU."""
    ids = torch.tensor([prompt + completion], device=base.model.device)
    logits = base.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


def _of(logps: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logps.gather(-1, torch.tensor(ids)[:, None]).squeeze(-1)


def _on(bench: Bench, dtype: str) -> str:
    return f"{bench.device} {dtype}"
