"""The trainer: equal to stock TRL, independent of the micro-batch, and without effect on the base."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, Qwen3Config

from benchmarks.stock import stock_trainer
from losslens.losses import Batch, Loss, builtin_losses
from losslens.losses.dft import Dft
from losslens.losses.dpo import Dpo, LossType
from losslens.losses.grpo import Grpo
from losslens.losses.kto import Kto
from losslens.losses.rft import Rft
from losslens.losses.rift import Rift
from losslens.losses.rpo import Rpo
from losslens.losses.sft import Sft
from losslens.models.adapters import adapter_fingerprint, initial_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.training.batches import Examples
from losslens.training.lm_head import has_plain_head
from losslens.training.reference import ReferenceCache
from losslens.training.run import TrainingPlan, make_trainer
from losslens.training.source import data_order
from tests.conftest import frozen_source, train_frozen


def usable(name: str, kind: type[Loss]) -> Loss:
    """A loss with its defaults, or with the base for a sampler whose probabilities these rollouts do not have."""
    loss = kind(name=name)
    return kind(name=name, behaviour="base") if "sampler" in loss.needs else loss


ALL = [usable(name, kind) for name, kind in builtin_losses().items()]
# TRL's head, on padded batches: what stock TRL computes, in its order.
AS_TRL: dict[str, Any] = {"selected_head": False, "packed": False}
# One of each unit, and one whose weights are of whole rollouts.
FEW = [Sft(name="sft"), Rift(name="rift", form="sequence_mean"), Kto(name="kto"), Dpo(name="dpo")]
few_losses = pytest.mark.parametrize("method", FEW, ids=lambda method: method.name)
each_loss = pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
Weights = dict[str, torch.Tensor]
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@contextlib.contextmanager
def trainer_of(
    plan: TrainingPlan,
    base: LoadedModel,
    tokenised: pd.DataFrame,
    folder: Path,
    reference: ReferenceCache | None = None,
    **options: Any,
) -> Iterator:
    AcceleratorState._reset_state(reset_partial_state=True)
    with preserved(base.model):
        yield make_trainer(plan, base, frozen_source(plan, tokenised, reference=reference), folder, [], **options)


def trained(plan: TrainingPlan, base: LoadedModel, tokenised: pd.DataFrame, folder: Path, **options: Any) -> Weights:
    """The adapter's weights after our trainer has run."""
    with trainer_of(plan, base, tokenised, folder, **options) as trainer:
        trainer.train()
        return weights_of(trainer)


def first_step(trainer: Any) -> list[dict[str, torch.Tensor]]:
    """Its micro-batches."""
    return trainer.get_batch_samples(iter(()), trainer.args.gradient_accumulation_steps, trainer.args.device)[0]


def weights_of(trainer: Any) -> Weights:
    state = get_peft_model_state_dict(trainer.model)
    return {name: value.detach().clone() for name, value in state.items()}


def largest_difference(first: Weights, second: Weights) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def stock(plan: TrainingPlan, base: LoadedModel, tokenised: pd.DataFrame, folder: Path) -> Weights:
    """The adapter's weights after stock TRL has run on the same rows, in the same order, from the same adapter."""
    with preserved(base.model):
        trainer = stock_trainer(plan, base, tokenised, folder)
        trainer.train()
        return weights_of(trainer)


@pytest.mark.parametrize("method", [Sft(name="sft"), Dft(name="dft"), Dpo(name="dpo")], ids=lambda method: method.name)
def test_equals_stock_trl_over_ten_steps(
    method: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Stock TRL reads text (DPO) or ids (SFT), scores with its own head, and has its own losses.

    With TRL's head under our losses the same operations run: there the weights are bit-equal.
    """
    plan = make_plan(method, batch_size=8)
    few = tokenised.iloc[:40]  # two epochs of rollouts, more of pairs
    theirs = stock(plan, base, few, tmp_path / "stock")
    start = load_file(plan.initial_adapter / "adapter_model.safetensors")
    assert largest_difference(theirs, start) > 1e-3  # something was learned
    assert largest_difference(trained(plan, base, few, tmp_path / "selected"), theirs) < 1e-5
    assert largest_difference(trained(plan, base, few, tmp_path / "fused", **AS_TRL), theirs) == 0


@each_loss
def test_batch_32_equals_batch_8_accumulated_4_times(
    method: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    at_once = trained(make_plan(method, max_steps=2), base, tokenised, tmp_path / "at_once")
    accumulated = trained(make_plan(method, max_steps=2, micro_batch=8), base, tokenised, tmp_path / "accumulated")
    assert largest_difference(at_once, accumulated) < 1e-5


@few_losses
def test_what_is_logged_does_not_depend_on_the_micro_batch(
    method: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    lines = []
    for micro_batch in (8, 2):
        folder = tmp_path / str(micro_batch)
        folder.mkdir()
        plan = make_plan(method, max_steps=1, batch_size=8, micro_batch=micro_batch, log_steps=1)
        train_frozen(plan, base, tokenised, folder)
        lines += logged(folder)
    at_once, accumulated = lines
    assert accumulated == pytest.approx(at_once, rel=1e-4, abs=1e-6)
    assert 0 < at_once["train/weight/effective"] <= 1 + 1e-6
    assert ("train/log_ratio/correct" in at_once) == ("reference" in method.needs)
    assert at_once["train/clip/share"] in (0, 1)
    assert ("train/kl" in at_once) == ("mismatched_log_ratio" in method.needs)


@few_losses
def test_prompt_tokens_never_count(
    method: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Whoever scores the batch, policy or reference, scores the completions' tokens, all of them and no others."""
    with trainer_of(make_plan(method), base, tokenised, tmp_path) as trainer:
        [batch] = first_step(trainer)
        masks = []
        forward = trainer.model.get_base_model().forward

        def spy(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            masks.append(output.label_mask)
            return output

        trainer.model.get_base_model().forward = spy
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    if method.unit == "pair":
        pairs = method.select_pairs(tokenised)
        drawn = [pairs[i] for i in data_order(len(pairs), 32, 5)]
        rows = tokenised.iloc[[right for right, _ in drawn] + [wrong for _, wrong in drawn]]
    else:
        rows = tokenised.iloc[data_order(len(tokenised), 32, 5)]
    assert len(masks) == (2 if "reference" in method.needs else 1)
    for mask in masks:
        assert mask.sum(dim=1).tolist() == [len(ids) for ids in rows["completion_ids"]]
        first = mask.int().argmax(dim=1).tolist()
        assert first == [len(ids) - 1 for ids in rows["prompt_ids"]]  # position t scores token t + 1


@pytest.mark.parametrize("method", [loss for loss in ALL if loss.unit == "token"], ids=lambda method: method.name)
def test_the_loss_is_the_sum_over_the_completion_tokens_of_the_batch(
    method: Any, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Σ of the method's terms, from the full logits of policy and base, over the tokens of the effective batch."""
    with trainer_of(make_plan(method, micro_batch=8), base, tokenised, tmp_path) as trainer:
        trainer.accelerator.gradient_accumulation_steps = 4
        batches = first_step(trainer)
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with torch.no_grad():
                log_p = trainer.model(**inputs).logits[:, :-1].double().log_softmax(-1)
                with trainer.model.disable_adapter():
                    log_q = trainer.model(**inputs).logits[:, :-1].double().log_softmax(-1)
            labels = batch["labels"][:, 1:]
            mask = labels != -100
            logps, reference = (
                each.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * mask for each in (log_p, log_q)
            )
            top = log_p.topk(20).values.log_softmax(-1)
            dense = Batch(
                logps=logps,
                mask=mask,
                reward=batch["reward"],
                columns={k.removeprefix("columns/"): v for k, v in batch.items() if k.startswith("columns/")},
                reference=reference,
                top_entropy=-(top.exp() * top).sum(-1),
                divergence=(log_q.exp() * (log_q - log_p)).sum(-1),
            )
            total += method.terms(dense)[mask].sum().item() / tokens
        ours = sum(
            trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(tokens)).item()
            for batch in batches
        )
    assert ours == pytest.approx(total, rel=1e-5)


def test_advantages_of_the_dataset_are_within_prompts(tokenised: pd.DataFrame) -> None:
    advantage = Examples(tokenised, Grpo(name="grpo", bias=0.0)).columns["advantage"]
    mean = tokenised.groupby("problem_id")["reward"].transform("mean")
    assert advantage == pytest.approx((tokenised["reward"] - mean).to_numpy())
    assert np.std(advantage) > 0.1


def test_the_kl_reference_is_the_base(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """After some steps the reference still scores like the untouched base, and no longer like the policy."""
    with trainer_of(make_plan(Grpo(name="grpo", kl_coef=0.1), batch_size=8), base, tokenised, tmp_path) as trainer:
        batch, *_ = first_step(trainer)
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        tokens |= {"use_cache": False, "fused_lm_head": True}
        trainer.train()
        reference = trainer.base_logps(batch)
        with torch.no_grad():
            policy = trainer.model(**tokens).log_probs
    with torch.no_grad():
        logits = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    assert torch.allclose(reference, expected, atol=1e-5)
    assert (policy - expected).abs().max() > 1e-2


@few_losses
def test_the_base_is_unchanged(
    method: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    def fingerprint() -> tuple:
        model = base.model
        digest = hashlib.sha256()
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            digest.update(name.encode() + value.detach().numpy().tobytes())
        modules = [(name, type(part), sorted(vars(part)), part.training) for name, part in model.named_modules()]
        gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        configs = model.config.to_dict(), vars(model.config).keys(), model.generation_config.to_dict()
        return digest.hexdigest(), modules, gradients, hooks, model.forward.__func__, configs, repr(base.tokenizer)

    before = fingerprint()
    plan = make_plan(method, max_steps=2, batch_size=8, gradient_checkpointing=True)
    train_frozen(plan, base, tokenised, tmp_path / "first")
    assert fingerprint() == before


@pytest.mark.parametrize("method", [Sft(name="sft"), Dpo(name="dpo")], ids=lambda method: method.name)
def test_dropout_is_the_same_for_all_methods(
    method: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plan = make_plan(method)
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.25))
    with trainer_of(plan, base, tokenised, tmp_path) as trainer:
        rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(logits_scaling=8.0, **SMALL),
        Gemma2Config(final_logit_softcapping=0.01, head_dim=16, **SMALL),
        Qwen3Config(head_dim=16, **SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_transformed_logits_use_trls_head(
    config: Any, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Whatever the architecture does to its logits, our trainer's log-probabilities are those of its own forward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    other = LoadedModel(model.eval(), base.tokenizer)
    assert has_plain_head(model) == (config.model_type == "qwen3")
    plan = make_plan(Sft(name="sft"), micro_batch=4)
    plan = dataclasses.replace(plan, initial_adapter=initial_adapter(tmp_path, {}, model, plan.lora, 0))
    with trainer_of(plan, other, tokenised, tmp_path / "run") as trainer:
        batch, *_ = first_step(trainer)
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            expected = trainer.model(**tokens).logits[:, :-1].log_softmax(-1)
            found = trainer.model(**tokens, labels=batch["labels"], fused_lm_head=True).log_probs
    labels = batch["labels"][:, 1:]
    expected = expected.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1) * (labels != -100)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_run_after_others_is_byte_identical_to_the_run_alone(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    for number, method in enumerate(
        [Sft(name="sft"), Dpo(name="dpo"), Grpo(name="grpo", kl_coef=0.1), Sft(name="sft")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        train_frozen(make_plan(method, max_steps=3, batch_size=8), base, tokenised, folder)
    assert adapter_fingerprint(tmp_path / "0" / "adapter") == adapter_fingerprint(tmp_path / "3" / "adapter")
    assert adapter_fingerprint(tmp_path / "0" / "adapter") != adapter_fingerprint(tmp_path / "2" / "adapter")


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_run_resumes_byte_identically(
    damaged: bool, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Cut at step 7 with checkpoints every 3 steps: it goes on from step 6, and the log shows each step once.

    A later checkpoint that is half written is passed over, and so is the one of step 6 when it is damaged.
    """

    def cut(step: int, values: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    plan = make_plan(Grpo(name="grpo"), batch_size=8, save_steps=3, log_steps=1)
    facts = train_frozen(plan, base, tokenised, tmp_path / "whole")
    assert facts["resumed_from"] == 0
    with pytest.raises(KeyboardInterrupt):
        train_frozen(plan, base, tokenised, tmp_path / "cut", cut)
    half_written = tmp_path / "cut" / "checkpoints" / "checkpoint-9"
    half_written.mkdir()
    (half_written / "trainer_state.json").write_text('{"global_st')
    if damaged:
        optimizer = tmp_path / "cut" / "checkpoints" / "checkpoint-6" / "optimizer.pt"
        optimizer.write_bytes(optimizer.read_bytes()[:-10])
    facts = train_frozen(plan, base, tokenised, tmp_path / "cut")
    assert facts["resumed_from"] == (3 if damaged else 6)
    assert adapter_fingerprint(tmp_path / "cut" / "adapter") == adapter_fingerprint(tmp_path / "whole" / "adapter")
    whole, resumed = (logged(tmp_path / folder) for folder in ("whole", "cut"))
    assert resumed == whole
    assert len(whole) == 10
    assert "geometry/cosine_of_steps" in whole[-1]


def logged(folder: Path) -> list[dict[str, float]]:
    """What a run logged, but for how long it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("tokens_per_second", "share_of_time"))} for line in lines]


def test_a_run_that_diverges_ends(make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="diverged"):
        train_frozen(
            make_plan(Sft(name="sft"), learning_rate=1e30, log_steps=1, max_grad_norm=1e30),
            base,
            tokenised,
            tmp_path,
        )
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore:method.loss_type=robust is unbounded")
@pytest.mark.parametrize(
    ("loss_type", "ld_alpha"),
    [(kind, None) for kind in get_args(LossType) if kind != "sigmoid"]
    + [("sigmoid", 0.0), ("sigmoid", 0.5), ("ipo", 0.5), ("bco_pair", 0.5)],
)
def test_losses_on_pairs_equal_stock_trl(
    loss_type: LossType,
    ld_alpha: float | None,
    make_plan: Any,
    base: LoadedModel,
    uneven: pd.DataFrame,
    tmp_path: Path,
) -> None:
    """Over three steps, with TRL's head under both, on pairs of a longer and a shorter completion."""
    plan = make_plan(Dpo(name="dpo", loss_type=loss_type, ld_alpha=ld_alpha), max_steps=3, batch_size=4)
    few = uneven.iloc[:40]
    lengths = few["completion_ids"].map(len).to_numpy()
    longer = [int(np.sign(lengths[chosen] - lengths[rejected])) for chosen, rejected in plan.method.select_pairs(few)]
    assert {-1, 1} <= set(longer)
    theirs = stock(plan, base, few, tmp_path / "stock")
    assert largest_difference(theirs, load_file(plan.initial_adapter / "adapter_model.safetensors")) > 1e-3
    assert largest_difference(trained(plan, base, few, tmp_path / "ours", **AS_TRL), theirs) == 0


@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_rpo_equals_stock_trl_with_one_pair_in_a_step(
    alpha: float, make_plan: Any, base: LoadedModel, uneven: pd.DataFrame, tmp_path: Path
) -> None:
    """TRL's likelihood is a mean over the chosen tokens of a micro-batch: of one pair, over its chosen completion."""
    plan = make_plan(Rpo(name="rpo", alpha=alpha), max_steps=3, batch_size=1)
    few = uneven.iloc[:40]
    theirs = stock(plan, base, few, tmp_path / "stock")
    assert largest_difference(theirs, load_file(plan.initial_adapter / "adapter_model.safetensors")) > 1e-3
    assert largest_difference(trained(plan, base, few, tmp_path / "ours", **AS_TRL), theirs) < 1e-5


def test_rpo_without_likelihood_is_dpo_to_the_byte(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    fingerprints = []
    for number, method in enumerate([Dpo(name="dpo"), Rpo(name="rpo", alpha=0.0), Rpo(name="rpo", alpha=0.1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        train_frozen(make_plan(method, max_steps=3, batch_size=8), base, tokenised, folder)
        fingerprints.append(adapter_fingerprint(folder / "adapter"))
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_kto_equals_stock_trl_where_a_step_is_one_micro_batch(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """TRL takes z₀ over a micro-batch, ours is of the whole step: with one micro-batch a step they are the same.

    TRL also lets a prompt meet another rollout of its own: here each has one.
    """
    plan = make_plan(Kto(name="kto"), max_steps=3, batch_size=8)
    few = pd.concat([group.iloc[[number % 4]] for number, (_, group) in enumerate(tokenised.groupby("problem_id"))])
    theirs = stock(plan, base, few, tmp_path / "stock")
    assert largest_difference(theirs, load_file(plan.initial_adapter / "adapter_model.safetensors")) > 1e-3
    assert largest_difference(trained(plan, base, few, tmp_path / "ours", **AS_TRL), theirs) < 1e-6


@pytest.mark.parametrize(
    ("method", "without"),
    [
        (Rift(name="rift", reward_incorrect=-5.0), Rift(name="rift", reward_incorrect=0.0)),
        (Grpo(name="grpo", bias=0.0), Rft(name="rft")),
    ],
    ids=["rift", "grpo"],
)
def test_incorrect_rollouts_become_less_likely(
    method: Loss, without: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """The sign of the negative terms, seen in training: with them wrong rollouts end less likely than without."""
    final = []
    for number, variant in enumerate((method, without)):
        seen: dict[int, dict[str, float]] = {}
        folder = tmp_path / str(number)
        folder.mkdir()
        plan = make_plan(variant, 3e-3, max_steps=10, batch_size=16, log_steps=5)
        train_frozen(plan, base, tokenised, folder, seen.__setitem__)
        final.append(seen[10]["train/logps/incorrect"])
    assert final[0] < final[1] - 0.005


def test_rows_are_the_same_for_all_losses_on_single_rollouts(tokenised: pd.DataFrame) -> None:
    sets = [Examples(tokenised, loss) for loss in ALL if loss.unit != "pair"]
    assert all(np.array_equal(each.rows, sets[0].rows) for each in sets)
    assert all(each.table["completion_ids"].tolist() == sets[0].table["completion_ids"].tolist() for each in sets)
    pairs = Examples(tokenised, Dpo(name="dpo"))
    assert (pairs.table["reward"].to_numpy()[pairs.rows] == [1, 0]).all()


def test_data_order() -> None:
    order = data_order(10, 25, seed=1)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert list(order[:10]) != list(order[10:20])
    assert np.array_equal(order[:7], data_order(10, 7, seed=1))
    assert not np.array_equal(order, data_order(10, 25, seed=2))
