"""What tests share: the tiny student, a small frozen set of rollouts, and the entry scripts as subprocesses."""

from __future__ import annotations

import os

# Four test processes share two cores (`-n 4` in pyproject.toml), as some are usually waiting: for Slurm, a server, a
# browser. The models are too small for threads to help.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import atexit
import functools
import gc
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from losslens.config.training import Optim
from losslens.core.files import read_object, write_json
from losslens.models.adapters import LoraSettings, initial_adapter
from losslens.models.loading import LoadedModel, ModelSource, load_model
from losslens.rollouts.frozen import freeze

# What takes seconds to import is imported by what uses it: the process that only hands out the tests needs none of it.
if TYPE_CHECKING:
    from losslens.losses import Loss
    from losslens.problems.reasoning_gym import ReasoningGym
    from losslens.training.run import TrainingPlan
    from losslens.training.source import FrozenSource
    from tests.wandb_server import WandbServer

# A file is one process's work: the long ones come first, so that none of them is left to run alone at the end.
_FIRST = (
    "slurm", "controls", "experiments", "analysis", "sweep", "trainers", "data_parallel", "on_policy", "server",
    "architectures", "first_step", "report_browser", "from_elsewhere", "first_hour", "models", "slurm_submission",
    "file_data", "wandb", "tuning", "padding", "sampler", "source", "cli", "rollouts", "replacing", "generation",
    "memory", "vllm", "local", "sweep_shared", "migration", "installed", "wandb_dashboard",
)  # fmt: skip


ROOT = Path(__file__).parents[1]
TINY = ROOT / "src" / "losslens" / "tiny"
LORA = LoraSettings(r=4, alpha=8.0, dropout=0.0, target_modules=("k_proj", "o_proj", "q_proj", "v_proj"))
OPTIM: dict[str, Any] = {
    "max_steps": 10,
    "epochs": None,
    "batch_size": 32,
    "micro_batch": "auto",
    "scheduler": "cosine",
    "warmup_ratio": 0.05,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": "auto",
    "log_steps": 5,
    "save_steps": 100,
    "snapshot_steps": None,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Slow is what does not say that it is fast: a new file is in `make test` by itself, in `make test-fast` on purpose.
    for item in items:
        if item.get_closest_marker("fast") is None:
            item.add_marker("slow")
    order = {f"test_{name}": place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_is_collected() -> None:
    """Every trainer ends in a full garbage collection, half a second of modules, configurations and other tests."""
    import hypothesis  # noqa: F401  # looks for what refers to the generators it knows, which freezing hides

    gc.collect()
    gc.freeze()


def base_source(**changes: Any) -> ModelSource:
    options: dict[str, Any] = {"revision": None, "dtype": "float32", "device": "cpu", "trust_remote_code": False}
    return ModelSource("model.path", **{"path": str(TINY / "student"), **options, **changes})


@pytest.fixture(scope="session")
def base() -> Iterator[LoadedModel]:
    """The student, which all tests of a process share: it stays as it was loaded. `copy.deepcopy` what is to change."""
    import torch

    torch.manual_seed(0)
    loaded = load_model(base_source())
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    yield loaded
    after = loaded.model.state_dict()
    changed = [n for n, v in before.items() if n not in after or v.dtype != after[n].dtype or not v.equal(after[n])]
    assert not changed, f"a test changed the base that all share: {changed[:3]}"


@pytest.fixture(scope="session")
def source() -> ReasoningGym:
    from losslens.problems.reasoning_gym import ReasoningGym
    from tools import pretrain

    return ReasoningGym("chain_sum", pretrain.DIFFICULTY, pretrain_share=pretrain.SHARE)


@pytest.fixture(scope="session")
def rollouts(source: ReasoningGym) -> pd.DataFrame:
    """Forty prompts with four rollouts each: worked solutions, of which about a third end in another number."""
    from tools import pretrain

    rng = np.random.default_rng(0)
    rows = []
    for problem in source.problems("train", 40, seed=3):
        for sample in range(4):
            text = pretrain.worked_solution(problem)
            if rng.random() < 0.35:
                wrong = int(problem.answer) + int(rng.integers(1, 5))
                text = text.replace(f"= {problem.answer}\n<answer>{problem.answer}<", f"= {wrong}\n<answer>{wrong}<")
            rows.append(
                {
                    "problem_id": problem.id,
                    "prompt": problem.prompt,
                    "prompt_text": None,
                    "completion": text,
                    "reward": float(source.verifier(problem, text).correct),
                    "answer": problem.answer,
                    "sample": sample,
                    "source": "test",
                    "tokens": len(text),
                    "finished": True,
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def tokenised(rollouts: pd.DataFrame, base: LoadedModel) -> pd.DataFrame:
    from losslens.training.batches import tokenise

    return tokenise(rollouts, base.tokenizer)


@pytest.fixture(scope="session")
def uneven(rollouts: pd.DataFrame, base: LoadedModel) -> pd.DataFrame:
    """The same rollouts, tokenised, with completions whose lengths differ within pairs, either way."""
    from losslens.training.batches import tokenise

    endings = [" = 0" * (number * 7 % 4) for number in range(len(rollouts))]
    return tokenise(rollouts.assign(completion=rollouts["completion"] + endings), base.tokenizer)


@pytest.fixture(scope="session")
def initial(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initial_adapter(tmp_path_factory.mktemp("init"), {"sha256": "test"}, base.model, LORA, init_seed=7)


@pytest.fixture(scope="session")
def make_plan(initial: Path):
    """Makes a training plan for a method; keywords change the optimiser's settings."""
    from losslens.training.run import TrainingPlan

    def make(loss: Loss, learning_rate: float = 1e-3, **optim: Any) -> TrainingPlan:
        return TrainingPlan(loss, learning_rate, LORA, initial, Optim(**{**OPTIM, **optim}), seed=5)

    return make


def frozen_source(plan: TrainingPlan, tokenised: pd.DataFrame, **options: Any) -> FrozenSource:
    """Frozen rollouts in the order of the plan's seed."""
    from losslens.training.source import FrozenSource

    return FrozenSource(tokenised, plan.method, plan.optim, plan.seed, **options)


def train_frozen(
    plan: TrainingPlan,
    base: LoadedModel,
    tokenised: pd.DataFrame,
    folder: Path,
    on_metrics: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    references: Mapping[str, Path] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`train_run` on frozen rollouts."""
    from losslens.training.run import train_run

    return train_run(plan, base, frozen_source(plan, tokenised, **options), folder, on_metrics, references)


@pytest.fixture
def frozen(rollouts: pd.DataFrame, tmp_path: Path) -> Path:
    """The rollouts of the tests, frozen."""
    return freeze(rollouts, tmp_path / "rollouts", "test", {"policy": "test"})


@pytest.fixture(scope="session")
def wandb_process() -> Iterator[WandbServer]:
    from tests.wandb_server import serving

    with serving() as server:
        yield server


@pytest.fixture
def wandb_server(wandb_process: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    """A W&B server on loopback that knows nothing yet; the environment of this process and its children names it.

    A test that kills its server takes one of its own: `with serving() as server`.
    """
    import wandb

    wandb_process.reset()
    for name, value in wandb_process.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name.lower()))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # what this process knew of another server
    yield wandb_process
    wandb.teardown()
    wandb_process.fail()


class Started:
    """A script in a process of its own, which does not begin with half a dozen seconds of imports (tests/warm.py).

    In a `with` it is killed at the end, where it has not ended by itself.

    Args:
        command: A script and its arguments, or `-m`, a module and its arguments.
        environment: Its environment.
        folder: The folder that it runs in.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._stdout, self._stderr, self._status = (
            Path(self._folder.name, name) for name in ("stdout", "stderr", "status")
        )
        self._stdout.touch()
        self._stderr.touch()
        files = {"stdout": self._stdout, "stderr": self._stderr, "status": self._status}
        request = {
            "command": [str(part) for part in command], "environment": dict(environment),
            "folder": str(folder), **{name: str(file) for name, file in files.items()},
        }  # fmt: skip
        server, answers = _warm()
        server.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
        server.stdin.flush()  # type: ignore[union-attr]
        self.pid = int(answers.readline())

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self._folder.cleanup()

    @property
    def stdout(self) -> str:
        return _text(self._stdout)

    @property
    def stderr(self) -> str:
        return _text(self._stderr)

    def poll(self) -> int | None:
        """The exit status, None while it runs; −N where signal N ended it."""
        return int(self._status.read_text()) if self._status.exists() else None

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            assert time.monotonic() < end, f"still running\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"
            time.sleep(0.01)
        return status

    def signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and what it started."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)


def start(name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Started:
    """Starts an entry script, or another one, from the project's root; `env` comes on top of this process's."""
    return Started([name, *arguments], {**environment(), **(env or {})})


def script(name: str, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Runs an entry script; `check` is the exit status it must end with, None for any."""
    with start(name, *arguments) as process:
        status = process.wait(timeout=1200)
        outcome = subprocess.CompletedProcess([name, *arguments], status, process.stdout, process.stderr)
    return _checked(outcome, check)


def cold(name: str, *arguments: str, check: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The same as a user starts it: a new interpreter, which imports what the script itself asks for."""
    line = [sys.executable, name, *arguments]
    outcome = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment(), check=False)
    return _checked(outcome, check)


def _checked(outcome: subprocess.CompletedProcess[str], check: int | None) -> subprocess.CompletedProcess[str]:
    if check is not None:
        assert outcome.returncode == check, f"{outcome.stdout[-3000:]}\n{outcome.stderr[-3000:]}"
    return outcome


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def _text(file: Path) -> str:
    with file.open() as lines:  # as a pipe's, its line ends are \n
        return lines.read()


@functools.cache
def _warm() -> tuple[subprocess.Popen[str], TextIO]:
    ours, theirs = os.pipe()
    line = [sys.executable, str(ROOT / "tests" / "warm.py"), str(theirs)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True, "pass_fds": [theirs]}
    server = subprocess.Popen(line, cwd=ROOT, env=environment(), **pipes)
    os.close(theirs)
    atexit.register(server.communicate)  # closes its stdin, at which it ends
    return server, os.fdopen(ours)


METHODS = "method=sft,rft,dft,rift,grpo,dpo"
SMALL = [
    "data.train_size=60", "data.eval_size=40", "rollouts.max_tokens=64", "evaluation.max_tokens=64",
    "optim.max_steps=12", "optim.batch_size=4", "optim.save_steps=6", "optim.log_steps=2",
]  # fmt: skip


def command(output_dir: Path, *arguments: str) -> list[str]:
    flags = [argument for argument in arguments if argument == "-m"]
    overrides = [argument for argument in arguments if argument != "-m"]
    return ["train.py", *flags, *SMALL, f"output_dir={output_dir}", *overrides]  # of two values the last one counts


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole sweep. It is made once for all test processes; each file may change its copy."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent
    made, done = common / "sweep", common / "sweep.done"
    with FileLock(common / "sweep.lock"):
        if not done.exists():
            outcome = cold(*command(made, "-m", METHODS))
            assert outcome.stdout.count("completed") >= 6
            assert "python analyze.py sweep=main" in outcome.stdout
            done.touch()
    return shutil.copytree(made, tmp_path_factory.mktemp("sweep") / "outputs")


def remove_outcomes(file: Path) -> None:
    """Removes a file of outcomes that a test had made, and what the manifest says of it."""
    file.unlink()
    manifest = read_object(file.parents[1] / "manifest.json")
    manifest.get("outcomes", {}).pop(file.name, None)
    write_json(file.parents[1] / "manifest.json", manifest)


@contextmanager
def served_by(name: str, *arguments: Path) -> Iterator[str]:
    """The address of a server in a process of its own: `tests/<name>.py`, which prints its port."""
    line = [sys.executable, str(ROOT / "tests" / f"{name}.py"), *map(str, arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()
