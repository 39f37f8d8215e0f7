"""The two trainers: equal to stock TRL, to themselves in micro-batches, and without a trace on the base."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from losslens.methods import Method
from losslens.methods.dft import Dft
from losslens.methods.dpo import Dpo
from losslens.methods.grpo import Grpo
from losslens.methods.rft import Rft
from losslens.methods.rift import Rift
from losslens.methods.sft import Sft
from losslens.models import LoadedModel, adapter_sha256, as_it_was, load_adapter
from losslens.training.dataset import pairwise_dataset, pointwise_dataset, schedule
from losslens.training.run import TrainingPlan, last_checkpoint, make_trainer, train_run

MethodMaker = Callable[[], Method]
SIX = [Sft(name="sft"), Rft(name="rft"), Dft(name="dft"), Rift(name="rift"), Grpo(name="grpo"), Dpo(name="dpo")]
six_methods = pytest.mark.parametrize("method", SIX, ids=lambda method: method.name)
Weights = dict[str, torch.Tensor]


@contextlib.contextmanager
def trainer_of(
    plan: TrainingPlan, base: LoadedModel, tokenised: pd.DataFrame, folder: Path, **options: Any
) -> Iterator:
    AcceleratorState._reset_state(reset_partial_state=True)
    with as_it_was(base.model):
        yield make_trainer(plan, base, tokenised, folder, [], **options)[0]


def trained(plan: TrainingPlan, base: LoadedModel, tokenised: pd.DataFrame, folder: Path, **options: Any) -> Weights:
    """The adapter's weights after our trainer has run."""
    with trainer_of(plan, base, tokenised, folder, **options) as trainer:
        trainer.train()
        return weights_of(trainer)


def weights_of(trainer: Any) -> Weights:
    state = get_peft_model_state_dict(trainer.model)
    return {name: value.detach().clone() for name, value in state.items()}


def largest_difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def stock(plan: TrainingPlan, base: LoadedModel, tokenised: pd.DataFrame, folder: Path) -> Weights:
    """The adapter's weights after stock TRL has run on the same rows, in the same order, from the same adapter."""
    optim, order = plan.optim, []
    arguments = {
        "output_dir": str(folder),
        "learning_rate": plan.learning_rate,
        "max_steps": optim.max_steps,
        "per_device_train_batch_size": optim.batch_size,
        "lr_scheduler_type": optim.scheduler,
        "warmup_steps": optim.warmup,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": plan.seed,
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    with as_it_was(base.model):
        common = {
            "model": base.model,
            "processing_class": base.tokenizer,
            "peft_config": plan.lora.peft_config(),
        }
        if isinstance(plan.method, Dpo):
            pairs = plan.method.pair_rows(tokenised)
            order = schedule(len(pairs), optim.max_steps * optim.batch_size, plan.seed)
            rows = [
                {
                    "prompt": base.tokenizer.decode(tokenised["prompt_ids"].iloc[right]),
                    "chosen": tokenised["completion"].iloc[right],
                    "rejected": tokenised["completion"].iloc[wrong],
                }
                for right, wrong in (pairs[i] for i in order)
            ]
            config = DPOConfig(**arguments, beta=plan.method.beta)
            trainer: Any = DPOTrainer(args=config, train_dataset=Dataset.from_list(rows), **common)
        else:
            order = schedule(len(tokenised), optim.max_steps * optim.batch_size, plan.seed)
            rows = [
                {
                    "input_ids": tokenised["prompt_ids"].iloc[i] + tokenised["completion_ids"].iloc[i],
                    "labels": [-100] * len(tokenised["prompt_ids"].iloc[i]) + tokenised["completion_ids"].iloc[i],
                }
                for i in order
            ]
            config = SFTConfig(**arguments, loss_type="dft" if plan.method.name == "dft" else "nll")
            trainer = SFTTrainer(args=config, train_dataset=Dataset.from_list(rows), **common)
        load_adapter(trainer.model, plan.initial_adapter)
        trainer.train()
        return weights_of(trainer)


@pytest.mark.parametrize("method", [Sft(name="sft"), Dft(name="dft"), Dpo(name="dpo")], ids=lambda method: method.name)
def test_equals_stock_trl_over_ten_steps(
    method: Method, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Stock TRL reads text (DPO) or ids (SFT), scores with its own head, and has its own losses.

    With TRL's head under our losses the same operations run: there the weights are bit-equal.
    """
    plan = make_plan(method)
    theirs = stock(plan, base, tokenised, tmp_path / "stock")
    start = load_file(plan.initial_adapter / "adapter_model.safetensors")
    assert largest_difference(theirs, start) > 1e-3  # something was learned
    assert largest_difference(trained(plan, base, tokenised, tmp_path / "selected"), theirs) < 1e-5
    assert largest_difference(trained(plan, base, tokenised, tmp_path / "fused", selected_head=False), theirs) == 0


@six_methods
def test_batch_32_equals_batch_8_accumulated_4_times(
    method: Method, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    at_once = trained(make_plan(method), base, tokenised, tmp_path / "at_once")
    accumulated = trained(make_plan(method, micro_batch=8), base, tokenised, tmp_path / "accumulated")
    assert largest_difference(at_once, accumulated) < 1e-5


@six_methods
def test_prompt_tokens_never_count(
    method: Method, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """The loss has no term at a prompt's position: the scored positions are those of the completions, all of them."""
    with trainer_of(make_plan(method), base, tokenised, tmp_path) as trainer:
        batch = next(iter(trainer.get_train_dataloader()))
        scores = {}
        forward = trainer.model.get_base_model().forward

        def spy(*args: Any, **kwargs: Any) -> Any:
            scores["mask"] = forward(*args, **kwargs).label_mask
            return forward(*args, **kwargs)

        trainer.model.get_base_model().forward = spy
        labels = batch.get("labels")
        completion = batch["completion_mask"][:, 1:] == 1 if labels is None else labels[:, 1:] != -100
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    assert torch.equal(scores["mask"], completion)
    rows = tokenised.iloc[schedule(len(tokenised), 32, 5)]
    if labels is not None:
        assert completion.sum(dim=1).tolist() == [len(ids) for ids in rows["completion_ids"]]


@six_methods
def test_the_base_is_as_it_was(
    method: Method, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    def fingerprint() -> tuple:
        model = base.model
        digest = hashlib.sha256()
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        modules = [
            (name, type(module), sorted(vars(module)), module.training) for name, module in model.named_modules()
        ]
        gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        forward = model.forward.__func__
        return digest.hexdigest(), modules, gradients, hooks, forward, model.config.to_dict(), vars(model.config).keys()

    before = fingerprint()
    plan = make_plan(method, max_steps=2, gradient_checkpointing=True)
    train_run(plan, base, tokenised, tmp_path / "first", lambda step, values: None)
    assert fingerprint() == before


def test_a_run_after_others_is_byte_identical_to_the_run_alone(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    for number, method in enumerate(
        [Sft(name="sft"), Dpo(name="dpo"), Grpo(name="grpo", kl_coef=0.1), Sft(name="sft")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        train_run(make_plan(method, max_steps=3), base, tokenised, folder, lambda step, values: None)
    assert adapter_sha256(tmp_path / "0" / "adapter") == adapter_sha256(tmp_path / "3" / "adapter")
    assert adapter_sha256(tmp_path / "0" / "adapter") != adapter_sha256(tmp_path / "2" / "adapter")


def test_a_run_cut_short_goes_on_to_the_same_bytes(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Cut at step 7 with checkpoints every 3 steps: it goes on from step 6, and the log shows each step once."""

    def cut(step: int, values: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    plan = make_plan(Grpo(name="grpo"), save_steps=3, log_steps=1)
    facts = train_run(plan, base, tokenised, tmp_path / "whole", lambda step, values: None)
    assert facts["resumed_from"] == 0
    with pytest.raises(KeyboardInterrupt):
        train_run(plan, base, tokenised, tmp_path / "cut", cut)
    half_written = tmp_path / "cut" / "checkpoints" / "checkpoint-9"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text('{"global_st')
    facts = train_run(plan, base, tokenised, tmp_path / "cut", lambda step, values: None)
    assert facts["resumed_from"] == 6
    assert adapter_sha256(tmp_path / "cut" / "adapter") == adapter_sha256(tmp_path / "whole" / "adapter")
    whole, resumed = ((tmp_path / folder / "metrics.jsonl").read_text() for folder in ("whole", "cut"))
    assert resumed == whole
    assert whole.count("\n") == 10
    assert last_checkpoint(tmp_path / "cut" / "checkpoints") is None


def test_a_run_that_diverges_ends(make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        train_run(
            make_plan(Sft(name="sft"), learning_rate=1e30, log_steps=1, max_grad_norm=1e30),
            base,
            tokenised,
            tmp_path,
            lambda step, values: None,
        )
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("loss_type", ["ipo", "hinge", "apo_zero"])
def test_trls_other_pairwise_losses_pass_through(
    loss_type: Any, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plan = make_plan(Dpo(name="dpo", loss_type=loss_type), max_steps=3)
    other = make_plan(Dpo(name="dpo"), max_steps=3)
    weights = [trained(p, base, tokenised, tmp_path) for p in (plan, other)]
    assert largest_difference(*weights) > 1e-6


def test_wrong_rollouts_are_pushed_down_or_left_alone(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """The sign of the negative terms, seen in training: the log-probability of wrong rollouts falls below SFT's."""
    final = {}
    for method in (Sft(name="sft"), Rift(name="rift", reward_wrong=-1.0), Grpo(name="grpo", bias=0.0)):
        seen: dict[int, dict[str, float]] = {}
        folder = tmp_path / method.name
        folder.mkdir()
        train_run(make_plan(method, max_steps=20, log_steps=5), base, tokenised, folder, seen.__setitem__)
        final[method.name] = seen[20]["train/logps/wrong"]
    assert final["rift"] < final["sft"]
    assert final["grpo"] < final["sft"]


def test_rows_are_the_same_for_all_pointwise_methods(tokenised: pd.DataFrame) -> None:
    sets = [pointwise_dataset(tokenised, method) for method in SIX[:5]]
    assert all(dataset["input_ids"] == sets[0]["input_ids"] for dataset in sets)
    pairs = pairwise_dataset(tokenised, Dpo(name="dpo"))
    right = tokenised[tokenised["reward"] > 0]
    assert set(map(tuple, pairs["chosen_ids"])) <= set(map(tuple, right["completion_ids"]))


def test_schedule() -> None:
    order = schedule(10, 25, seed=1)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert list(order[:10]) != list(order[10:20])
    assert np.array_equal(order[:7], schedule(10, 7, seed=1))
    assert not np.array_equal(order, schedule(10, 25, seed=2))
