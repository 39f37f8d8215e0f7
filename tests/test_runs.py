"""Who a run is: what changes its identity, and what must not."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from losslens.config import TrainConfig, parse
from losslens.errors import InputError
from losslens.runs import Run, base_run, runs_of
from losslens.spec import RunSpec
from tests.conftest import ROOT, TINY


def config(*overrides: str) -> TrainConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(TrainConfig, compose("train", list(overrides)))


def run(*overrides: str) -> Run:
    return RunSpec.of(config(*overrides)).run


def identity(*overrides: str) -> str:
    return run(*overrides).name.rpartition("-")[2]


def test_the_folder_says_what_it_is() -> None:
    assert run().folder.parent == Path("outputs/main")
    assert run("method=dpo", "lr=matched", "lora_rank=r16", "seed=3").name.startswith("dpo-matched-r16-tiny-s3-")


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=/elsewhere",
        "sweep=other",
        "logger=none",
        "optim.micro_batch=8",
        "optim.log_steps=1",
        "optim.save_steps=10",
        "optim.gradient_checkpointing=true",
        "evaluation.batch_size=1",
        "data.eval=10",
        "data.name=renamed",
        "model.name=renamed",
        "lora_rank.alpha=16",  # what it is anyway: twice the rank
        "model.target_modules=[v_proj,o_proj,q_proj,k_proj]",
        "lr=matched",  # for a pointwise method the same rate
    ],
)
def test_what_is_no_science_changes_no_identity(override: str) -> None:
    assert identity(override) == identity()


@pytest.mark.parametrize(
    "override",
    [
        "method=rft",
        "seed=1",
        "init_seed=1",
        "lr.base=2e-3",
        "lora_rank=r4",
        "lora_rank.alpha=8",
        "model.target_modules=[q_proj]",
        "model.dtype=bfloat16",
        f"model.path={TINY / 'teacher'} model.teacher={TINY / 'teacher'}",
        "data.seed=1",
        "data.train=10",
        "rollouts.k=2",
        "rollouts.policy=base",
        "optim.max_steps=1",
        "optim.batch_size=16",
        "optim.warmup=0",
    ],
)
def test_what_changes_the_adapter_changes_the_identity(override: str) -> None:
    assert identity(*override.split()) != identity()


def test_a_methods_options_are_part_of_the_identity() -> None:
    assert len({identity("method=grpo", f"method.bias={bias}") for bias in (0.0, 0.1, 0.2)}) == 3
    assert identity("method=dpo", "lr=matched") != identity("method=dpo")


def test_a_model_is_known_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    shutil.copytree(TINY / "student", tmp_path / "copy")
    assert identity(f"model.path={tmp_path / 'copy'}", f"model.teacher={TINY / 'teacher'}") == identity()


def test_rollouts_that_are_given_are_known_by_their_content(frozen: Path, tmp_path: Path) -> None:
    shutil.copytree(frozen, tmp_path / "copy")
    assert identity(f"rollouts.path={tmp_path / 'copy'}") == identity(f"rollouts.path={frozen}") != identity()


def test_learning_rates() -> None:
    assert config("lr.base=0.5").lr.of(pairwise=False) == 0.5
    assert config("lr.base=0.5").lr.of(pairwise=True) == pytest.approx(0.05)
    assert config("lr.base=0.5", "lr=matched").lr.of(pairwise=True) == 0.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora_rank.r=0", "lora_rank.r: "),
        ("lora_rank.r=x", "lora_rank.r: "),
        ("lr.base=-1", "lr.base: "),
        ("lr.base=inf", "lr.base: "),
        ("optim.max_steps=0", "optim.max_steps: "),
        ("optim.save_steps=7", "optim: log_steps=5 does not divide save_steps=7"),
        (
            "optim.micro_batch=0",
            "optim.micro_batch: Input should be 'auto', or Input should be greater than or equal to 1",
        ),
        ("optim.micro_batch=5", "optim: micro_batch=5 does not divide batch_size=32"),
        ("rollouts.temperature=0", "rollouts.temperature: "),
        ("rollouts.policy=other", "rollouts.policy: "),
        ("sweep=../up", "sweep: "),
        ("seed=-1", "seed: "),
        ("data.train=0", "data.train: "),
        ("model.path=/no/such/folder", "model.path=/no/such/folder: no such folder"),
        ("rollouts.path=/no/such/folder", "/no/such/folder/manifest.json: no such file"),
        ("method._target_=losslens.nothing", "method._target_: "),
        ("+method.extra=1", "method.extra: "),
    ],
)
def test_bad_values_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(InputError) as refusal:
        run(override)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("grpo", "bias_scope=some"),
        ("grpo", "kl_coef=-1"),
        ("dpo", "beta=0"),
        ("dpo", "pairs=two"),
        ("rft", "wrong=keep"),
    ],
)
def test_bad_options_of_a_method_are_refused_by_name(method: str, option: str) -> None:
    with pytest.raises(InputError, match=f"method.{option.partition('=')[0]}"):
        run(f"method={method}", f"method.{option}")


def test_a_sweeps_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sweep=main: no folder"):
        runs_of(tmp_path, "main")
    for name, state in (("b", "completed"), ("a", "failed"), ("base-x", "completed")):
        Run(tmp_path / "main" / name).set_state(state)
    (tmp_path / "main" / "analysis").mkdir()
    assert [(r.name, r.status["state"]) for r in runs_of(tmp_path, "main")] == [
        ("base-x", "completed"),
        ("a", "failed"),
        ("b", "completed"),
    ]
    assert base_run(tmp_path / "main", config().model).name.startswith("base-tiny-")


def _hold(folder: Path) -> tuple[float, float]:
    with Run(folder).lock():
        entered = time.monotonic()
        time.sleep(0.3)
        return entered, time.monotonic()


def test_a_run_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second = sorted(pool.map(_hold, [tmp_path / "run"] * 2, chunksize=1))
    assert first[1] <= second[0]
