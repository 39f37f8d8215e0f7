"""Data-parallel training with two processes: equal to one process, and in lockstep through a whole sweep."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core import distributed
from losslens.losses import builtin_losses
from losslens.losses.pairs import mixed_pairs
from losslens.losses.presentation import builtin_presentations
from losslens.pipeline.train_job import Outcome, train_job
from losslens.rollouts.frozen import freeze
from losslens.runs.run import Run
from losslens.training.batches import split_by_length
from losslens.training.source import data_order
from losslens.training.trainer import LossTrainer
from tests.conftest import ROOT, Started, start

# SFT first: the others are compared with it. RFT and GRPO are those that a process is killed in; then a loss of each
# unit and divisor, and one that needs each input. The rollouts do not have the sampler's log-probabilities.
METHODS = ["sft", "rft", "grpo", "redi", "dpo", "kto", "asft", "eaft"]
SMALL = (
    "data.eval_size=0", "logger=none", "optim.max_steps=6", "optim.batch_size=8", "optim.save_steps=2",
    "optim.log_steps=2",
)  # fmt: skip

# ‖difference‖ / ‖ΔW‖ of one process and two. Rounding makes 2e-6. A loss that lacks the factor of the processes makes
# 2e-4 (Adam hardly sees a factor; the metrics do), tokens counted by each process alone 0.1, wrong rows 0.5.
TOLERANCE = 2e-5

# Runs train.py; each process writes down the rows that it meets.
SPY = """
import json, os, runpy, sys
from losslens.training.trainer import LossTrainer
seen = open(f"{sys.argv.pop(1)}-{os.environ['RANK']}.jsonl", "w")
def spied(kind, name):
    original = getattr(kind, name)
    def method(self, model, inputs, *args, **kwargs):
        rows = [ids[mask == 1].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"])]
        print(json.dumps([self.loss.name, self.state.global_step, rows]), file=seen, flush=True)
        return original(self, model, inputs, *args, **kwargs)
    setattr(kind, name, method)
spied(LossTrainer, "compute_loss")
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""

# Runs train.py; at one learning rate the second process fails in its third micro-batch.
FAILING = """
import os, runpy, sys
from losslens.training.trainer import LossTrainer
original, calls = LossTrainer.compute_loss, []
def compute_loss(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.args.learning_rate == 2e-3:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return original(self, *args, **kwargs)
LossTrainer.compute_loss = compute_loss
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""

# Runs train.py; the main process is killed when the fifth step of GRPO begins, after the checkpoint of the fourth.
KILLED = """
import os, runpy, signal, sys
from losslens.training.trainer import LossTrainer
original = LossTrainer.compute_loss
def compute_loss(self, *args, **kwargs):
    if os.environ["RANK"] == "0" and self.loss.name == "grpo" and self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
LossTrainer.compute_loss = compute_loss
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""

Rows = dict[tuple[str, int], list[list[int]]]


def arguments(output_dir: Path, frozen: Path, *overrides: str) -> list[str]:
    return [*SMALL, f"rollouts.path={frozen}", f"output_dir={output_dir}", *overrides]


def job(output_dir: Path, frozen: Path, *overrides: str) -> Outcome:
    """One job by one process, which is this one."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return train_job(parse(TrainConfig, compose("train", [*arguments(output_dir, frozen, *overrides)])))


def torchrun(*line: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=2",
        *line,
    ]  # fmt: skip


@contextlib.contextmanager
def steps(*line: str, count: int = 2) -> Iterator[list[Started]]:
    """Processes that are told by their environment alone who they are, as a Slurm step tells them."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        # submitit's MASTER_PORT may be that of another process, as this one is.
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        common = {
            "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1]),
            distributed.PORT_FILE: f"{folder}/port",
        }  # fmt: skip
        yield [
            stack.enter_context(start(*line, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(count)
        ]
        assert not list(Path(folder).iterdir())


def ended(process: Started, status: int) -> tuple[str, str]:
    assert process.wait() == status, f"{process.stdout[-3000:]}\n{process.stderr[-6000:]}"
    return process.stdout, process.stderr


def run_of(output_dir: Path, method: str) -> Run:
    [folder] = (output_dir / "main").glob(f"{method}-*")
    return Run(folder)


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def metrics(run: Run) -> list[dict[str, float]]:
    """What a run logged, but for how long it took."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("tokens_per_second", "share_of_time"))} for line in lines]


def difference(first: Run, second: Run) -> float:
    """‖ΔW_1 − ΔW_2‖ / ‖ΔW_1‖, without the common scale."""
    ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (first, second))
    apart, norm = 0.0, 0.0
    for name in ours:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            update = ours[b].double() @ ours[name].double()
            apart += (update - theirs[b].double() @ theirs[name].double()).square().sum().item()
            norm += update.square().sum().item()
    assert norm > 0
    return (apart / norm) ** 0.5


@pytest.fixture(scope="module")
def given(rollouts: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze(rollouts, tmp_path_factory.mktemp("given"), "test", {"policy": "test"})


@pytest.fixture(scope="module")
def one(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """Each method by one process, a step in two micro-batches of 4; and the rows of each step."""
    output_dir, seen = tmp_path_factory.mktemp("one"), Rows()

    def spied(original: Callable) -> Callable:
        def method(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            rows = [ids[mask == 1].tolist() for ids, mask in pairs]
            seen.setdefault((self.loss.name, self.state.global_step), []).extend(rows)
            return original(self, model, inputs, *args, **kwargs)

        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossTrainer, "compute_loss", spied(LossTrainer.compute_loss))
        for method in METHODS:
            assert job(output_dir, given, f"method={method}", "optim.micro_batch=4").state == "completed"
    return output_dir, seen


@pytest.fixture(scope="module")
def two(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Rows]]:
    """The same by two processes, each in two micro-batches of 2; and the rows of each step of each process."""
    output_dir = tmp_path_factory.mktemp("two")
    output, seen = spied_on(output_dir, given, METHODS, count=2)
    assert output.count(": completed") == len(METHODS)
    assert output.count("python analyze.py sweep=main") == 1
    return output_dir, seen


def spied_on(output_dir: Path, given: Path, methods: list[str], count: int, *overrides: str) -> tuple[str, list[Rows]]:
    """What the main one of several processes says that train `methods`, and the rows of each step of each process."""
    (output_dir / "spy.py").write_text(SPY)
    line = ["-m", *arguments(output_dir, given, f"method={','.join(methods)}", "optim.micro_batch=2", *overrides)]
    with steps(str(output_dir / "spy.py"), str(output_dir / "rows"), *line, count=count) as processes:
        output, _ = ended(processes[0], 0)
        assert all(ended(process, 0)[0] == "" for process in processes[1:])
    seen: list[Rows] = [{} for _ in range(count)]
    for rank in range(count):
        for entry in (output_dir / f"rows-{rank}.jsonl").read_text().splitlines():
            method, step, rows = json.loads(entry)
            seen[rank].setdefault((method, step), []).extend(rows)
    return output, seen


def test_every_kind_of_loss_is_here() -> None:
    losses = [builtin_losses()[name](name=name) for name in builtin_presentations() if name in builtin_losses()]
    here = [loss for loss in losses if loss.name in METHODS]
    assert {(loss.unit, loss.divisor) for loss in here} == {(loss.unit, loss.divisor) for loss in losses}
    assert set().union(*(loss.needs for loss in here)) == set().union(*(loss.needs for loss in losses)) - {"sampler"}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does(method: str, one: tuple[Path, Rows], two: tuple[Path, list[Rows]]) -> None:
    ours, theirs = run_of(two[0], method), run_of(one[0], method)
    assert ours.name == theirs.name
    assert ours.manifest["training"]["processes"] == 2
    assert theirs.manifest["training"]["processes"] == 1
    assert ours.manifest["identity"] == theirs.manifest["identity"]
    assert difference(theirs, ours) < TOLERANCE
    assert [line["step"] for line in metrics(ours)] == [2, 4, 6]
    for line, expected in zip(metrics(ours), metrics(theirs), strict=True):
        assert line == pytest.approx(expected, rel=2e-5, abs=5e-6)  # KTO's z₀: a difference of sums of 30 nats
        assert line["train/completion_tokens"] == expected["train/completion_tokens"]
        assert line["train/num_tokens"] == expected["train/num_tokens"]
        assert line["train/epoch"] == expected["train/epoch"]


def test_both_see_the_same_rows_in_each_step(one: tuple[Path, Rows], two: tuple[Path, list[Rows]]) -> None:
    """Together the rows of one process, none twice; and not as many tokens each, so that the counts must be added."""
    first, second = two[1]
    assert one[1].keys() == first.keys() == second.keys()
    assert len(first) == 6 * len(METHODS)
    for place, rows in one[1].items():
        assert len(first[place]) == len(second[place]) == len(rows) / 2
        assert sorted(first[place] + second[place]) == sorted(rows)
    tokens = [[sum(map(len, rows)) for rows in seen.values()] for seen in (first, second)]
    assert sum(a != b for a, b in zip(*tokens, strict=True)) > 20


def test_assignment_of_rows_to_processes(
    given: Path, one: tuple[Path, Rows], two: tuple[Path, list[Rows]], tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """The examples of a step are dealt out by length, the longest first; of pairs the chosen ones come first.

    By hand for the first step of three processes, batch 12: the second one meets the second longest, then every third.
    """
    _, three = spied_on(tmp_path, given, ["sft", "dpo"], 3, "optim.batch_size=12", "optim.max_steps=3")
    both = list(zip(tokenised["prompt_ids"], tokenised["completion_ids"], strict=True))
    singles = [[row] for row in range(len(both))]
    examples = {"sft": singles, "dpo": mixed_pairs(tokenised, "one")}
    order = {name: data_order(len(examples[name]), 48, seed=42) for name in examples}
    joined = [[*both[row][0], *both[row][1]] for row in order["sft"][:12]]
    longest_first = sorted(range(12), key=lambda number: -len(joined[number]))
    assert sorted(three[1]["sft", 0]) == sorted(joined[number] for number in longest_first[1::3])
    for world, micro_batch, batch_size, steps_ in ((one[1:], 4, 8, 6), (two[1], 2, 8, 6), (three, 2, 12, 3)):
        for name, step, rank in itertools.product(examples, range(steps_), range(len(world))):
            expected = []
            drawn = [examples[name][i] for i in order[name][step * batch_size :][:batch_size]]
            lengths = np.array([max(sum(map(len, both[row])) for row in rows) for rows in drawn])
            own = np.sort(np.argsort(-lengths, kind="stable")[rank :: len(world)])
            for part in split_by_length(lengths[own], len(own) // micro_batch):
                met = [drawn[number] for number in own[part]]
                expected += [[*both[row][0], *both[row][1]] for side in zip(*met, strict=True) for row in side]
            assert world[rank][name, step] == expected
            assert len(expected) == batch_size // len(world) * len(examples[name][0])


def test_killed_processes_resume_byte_identically(
    given: Path, two: tuple[Path, list[Rows]], one: tuple[Path, Rows], tmp_path: Path
) -> None:
    """Killed in the second run; then, meanwhile, one process begins a third, which two go on with, and the reverse.

    When the same command comes again, somebody else is at the first run, for a while.
    """
    killed, alone = tmp_path / "killed", tmp_path / "alone"
    line = ["-m", *arguments(killed, given, "method=sft,grpo,rft", "optim.micro_batch=2")]
    (tmp_path / "killed.py").write_text(KILLED)
    with steps(str(tmp_path / "killed.py"), *line) as processes:
        ended(processes[0], -signal.SIGKILL)
    # The other process may have found out already, and said so.
    assert run_of(killed, "grpo").status["state"] in ("running", "failed")
    assert (run_of(killed, "grpo").checkpoints / "checkpoint-4" / "rng_state_1.pth").exists()
    shutil.copytree(killed, alone)
    assert job(alone, given, "method=grpo", "optim.micro_batch=4").state == "completed"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        set_state = Run.set_state

        def interrupted(self: Run, state: Any, **details: Any) -> None:
            set_state(self, state, **details)
            if state == "running" and details.get("step") == 6:
                raise KeyboardInterrupt

        patch.setattr(Run, "set_state", interrupted)
        job(killed, given, "method=rft", "optim.micro_batch=4")

    lock = FileLock(killed / "main" / f".{run_of(killed, 'sft').name.rpartition('-')[2]}.lock")
    with steps("train.py", *line) as processes:
        with lock:
            while "locked by another process; left for later" not in processes[0].stdout:
                assert processes[0].poll() is None, ended(processes[0], 0)
                time.sleep(0.05)
            time.sleep(1)
        output, _ = ended(processes[0], 0)
        assert ended(processes[1], 0)[0] == ""
    assert output.count(": skipped") == 1
    assert output.count(": completed") == 2
    for method, resumed_from in (("sft", 0), ("grpo", 4), ("rft", 4)):
        run = run_of(killed, method)
        assert run.manifest["training"]["resumed_from"] == resumed_from
        assert not run.checkpoints.exists()
    for method in ("sft", "grpo"):
        assert adapter_bytes(run_of(killed, method)) == adapter_bytes(run_of(two[0], method))
        assert metrics(run_of(killed, method)) == metrics(run_of(two[0], method))
    assert difference(run_of(one[0], "rft"), run_of(killed, "rft")) < TOLERANCE
    assert difference(run_of(one[0], "grpo"), run_of(alone, "grpo")) < TOLERANCE


def test_a_batch_that_cannot_be_shared_is_one_line(given: Path, tmp_path: Path) -> None:
    with steps("train.py", *arguments(tmp_path, given, "optim.batch_size=9")) as processes:
        _, errors = ended(processes[0], 2)
        assert errors == "train.py: optim.batch_size=9 is not divisible by the 2 processes\n"
        assert ended(processes[1], 0) == ("", "")


def test_a_sweep_stays_in_step_until_one_process_fails(given: Path, tmp_path: Path) -> None:
    """Nine jobs: each third is refused by the configuration and each third later; one diverges, one is trained.

    In the last one the second process fails while the first one waits for its gradients: all end, the cause is kept.
    """
    (tmp_path / "failing.py").write_text(FAILING)
    jobs = ("-m", "lr.peak=1e30,1e-3,2e-3", "optim.micro_batch=8,x,2")
    line = [*jobs, *arguments(tmp_path, given, "optim.max_grad_norm=1e30", "optim.max_steps=4")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        torchrun(str(tmp_path / "failing.py"), *line), cwd=ROOT, env=environment, start_new_session=True, **pipes
    )
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.terminate()  # torchrun, which ends the others
    assert process.returncode == 1
    runs = {run.manifest["learning_rate"]: run for run in map(Run, (tmp_path / "main").glob("sft-*"))}
    assert {rate: run.status["state"] for rate, run in runs.items()} == {
        1e30: "failed",
        1e-3: "completed",
        2e-3: "failed",
    }
    assert runs[1e30].divergence
    assert output.count(": completed") == 1
    # Each reason once, by one process.
    refusal = "optim.micro_batch=8 does not divide 4, the share of each of the 2 processes in optim.batch_size=8"
    assert errors.count(f"train.py: {refusal}\n") == 1
    assert errors.count("train.py: optim.micro_batch: Input should be") == 1
    assert errors.count(f"train.py: {runs[1e30].name}: diverged: ") == 1
    assert "process 1: RuntimeError: out of memory with a micro-batch of 2" in runs[2e-3].status["error"]
    assert "set a smaller optim.micro_batch" in runs[2e-3].status["error"]
    assert "set a smaller optim.micro_batch" in errors
    assert "CUDA out of memory. Tried" in (runs[2e-3].folder / "error.txt").read_text()
