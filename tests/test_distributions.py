"""EAFT's entropy and ASFT's divergence in training: against the full logits, the authors' formulas, and DFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, GraniteConfig

from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.losses.asft import Asft
from losslens.losses.dft import Dft
from losslens.losses.eaft import Eaft
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel, load_model, preserved
from losslens.training import distributions
from losslens.training.run import make_trainer
from tests.conftest import base_source, frozen_source, train_frozen
from tests.test_trainers import SMALL, first_step, largest_difference, logged, trained, trainer_of

EAFT, ASFT = Eaft(name="eaft", alpha=0.5), Asft(name="asft", kl_coef=0.3)
both_losses = pytest.mark.parametrize("loss", [EAFT, ASFT], ids=["eaft", "asft"])
both_heads = pytest.mark.parametrize("selected_head", [True, False], ids=["ours", "trl"])


def moved(trainer: Any) -> None:
    """Moves the adapter away from the base, at which the divergence and its gradient are 0."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3


def gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def logits(trainer: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    full: torch.Tensor = trainer.model(**inputs).logits
    return full.float()


def eaft_as_in_llama_factory(policy: torch.Tensor, _: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`eaft_loss_func` with `num_items_in_batch`, from its names."""
    source, target = policy[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    valid = target != -100
    losses = cross_entropy(source, target, ignore_index=-100, reduction="none")[valid]
    with torch.no_grad():
        top, _ = source[valid].topk(20, dim=-1)
        log_probs = top - top.logsumexp(dim=-1, keepdim=True)
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        weight = (entropy / 3.0) ** EAFT.alpha
    return (losses * weight).sum() / valid.sum()


def asft_as_in_llama_factory(policy: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`asft_loss_func`, from its names: `dft_loss + asft_alpha · kl_loss`, each a mean over the tokens."""
    source, q, target = policy[:, :-1].flatten(0, 1), reference[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    valid = target != -100
    losses = cross_entropy(source, target, ignore_index=-100, reduction="none")[valid]
    dft = (losses * (-losses).exp().detach()).mean()
    kl = kl_div(source.log_softmax(dim=-1), q.softmax(dim=-1), reduction="none").sum(dim=-1)
    return dft + ASFT.kl_coef * (kl * valid).sum() / valid.sum()


@both_heads
@pytest.mark.parametrize(
    ("loss", "formula"), [(EAFT, eaft_as_in_llama_factory), (ASFT, asft_as_in_llama_factory)], ids=["eaft", "asft"]
)
def test_equals_llama_factory(
    loss: Loss, formula: Callable, selected_head: bool, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Value and gradient of every LoRA matrix, far from the base, with the full logits of both."""
    plan = make_plan(loss, batch_size=8)
    with trainer_of(plan, base, tokenised, tmp_path, selected_head=selected_head) as trainer:
        moved(trainer)
        [batch] = first_step(trainer)
        tokens = (batch["labels"][:, 1:] != -100).sum()
        with torch.no_grad(), trainer.model.disable_adapter():
            reference = logits(trainer, batch)
        theirs = formula(logits(trainer, batch), reference, batch["labels"])
        wanted = gradients(trainer, theirs)
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
        found = gradients(trainer, ours)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    scale = max(value.abs().max().item() for value in wanted.values())
    assert largest_difference(found, wanted) < 1e-5 * scale


@both_heads
def test_the_divergence_counts(
    selected_head: bool, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Its gradient is not small beside that of the likelihood, so that the test above would see it missing."""
    with trainer_of(make_plan(ASFT, batch_size=8), base, tokenised, tmp_path, selected_head=selected_head) as trainer:
        moved(trainer)
        [batch] = first_step(trainer)
        found = []
        for loss in (ASFT, Asft(name="asft", kl_coef=0)):
            trainer.loss = loss
            value = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
            found.append(gradients(trainer, value))
    assert largest_difference(*found) > 0.05 * max(value.abs().max().item() for value in found[1].values())


def test_without_the_divergence_it_is_dft_to_the_byte(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    losses = {"dft": Dft(name="dft"), "anchored": ASFT, "free": Asft(name="asft", kl_coef=0)}
    for name, loss in losses.items():
        (tmp_path / name).mkdir()
        plan = make_plan(loss, 1e-2, max_steps=3, batch_size=8, log_steps=1)
        train_frozen(plan, base, tokenised, tmp_path / name)
    dft, anchored, free = (adapter_fingerprint(tmp_path / name / "adapter") for name in losses)
    assert free == dft != anchored
    lines = logged(tmp_path / "anchored")
    assert lines[0]["train/divergence"] == pytest.approx(0, abs=1e-6)
    assert lines[2]["train/divergence"] > 1e-6
    assert "train/divergence" not in logged(tmp_path / "free")[0]


@both_losses
def test_with_checkpointed_layers_and_small_micro_batches(
    loss: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plain = trained(make_plan(loss, max_steps=3, batch_size=8), base, tokenised, tmp_path / "plain")
    options = {"max_steps": 3, "batch_size": 8, "micro_batch": 2}
    plan = make_plan(loss, **options, gradient_checkpointing=True)
    assert largest_difference(trained(plan, base, tokenised, tmp_path / "checkpointed"), plain) < 1e-5


def test_the_base_is_scored_without_dropout_and_draws_nothing(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plan = make_plan(ASFT, batch_size=8)
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.25))
    with trainer_of(plan, base, tokenised, tmp_path) as trainer:
        moved(trainer)
        trainer.model.train()
        [batch] = first_step(trainer)
        state = torch.get_rng_state()
        found = trainer._base_hidden_states(batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert trainer.model.training
        hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(1))
        assert not torch.equal(torch.get_rng_state(), state)  # the policy does
        assert [len(module._forward_hooks) for module in trainer.model.modules()] == hooks
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = base.model.base_model(**inputs).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-5)


@both_heads
def test_in_half_precision(selected_head: bool, make_plan: Any, tokenised: pd.DataFrame, tmp_path: Path) -> None:
    """As near to the full logits as bfloat16 allows."""
    half = load_model(base_source(dtype="bfloat16"))
    for loss, formula in ((EAFT, eaft_as_in_llama_factory), (ASFT, asft_as_in_llama_factory)):
        plan, folder = make_plan(loss, batch_size=8), tmp_path / loss.name
        with trainer_of(plan, half, tokenised, folder, selected_head=selected_head) as trainer:
            moved(trainer)
            [batch] = first_step(trainer)
            tokens = (batch["labels"][:, 1:] != -100).sum()
            with torch.no_grad(), trainer.accelerator.autocast():
                with trainer.model.disable_adapter():
                    reference = logits(trainer, batch)
                theirs = formula(logits(trainer, batch), reference, batch["labels"])
            ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
            assert all(value.isfinite().all() for value in gradients(trainer, ours).values())
        assert ours.item() == pytest.approx(theirs.item(), rel=0.02)


def test_entropy_of_the_most_likely_tokens_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits: ln 20, however many tokens there are; of three tokens ln 3; a certain one 0; and of no position."""
    head = torch.nn.Linear(2, 30, bias=False)
    torch.nn.init.zeros_(head.weight)
    assert distributions.top_entropy(head, torch.ones(3, 2)).tolist() == pytest.approx([2.995732] * 3)
    three = torch.nn.Linear(2, 3, bias=False)
    torch.nn.init.zeros_(three.weight)
    assert distributions.top_entropy(three, torch.ones(1, 2)).tolist() == pytest.approx([1.098612])
    with torch.no_grad():
        head.weight[7] = 100
    assert distributions.top_entropy(head, torch.ones(1, 2)).tolist() == pytest.approx([0])
    assert distributions.top_entropy(head, torch.ones(0, 2)).shape == (0,)
    torch.nn.init.normal_(head.weight)
    hidden = torch.randn(10, 2)
    at_once = distributions.top_entropy(head, hidden)
    monkeypatch.setattr(distributions, "_CHUNK", 3)
    assert torch.allclose(distributions.top_entropy(head, hidden), at_once)
    assert not at_once.requires_grad


def test_divergence_by_hand() -> None:
    """p = (.5, .3, .2), q = (.4, .4, .2): .4·ln .8 + .4·ln(4/3) = .025815, with gradient p − q on the logits."""
    p, q = (torch.tensor([values]).log() for values in ([0.5, 0.3, 0.2], [0.4, 0.4, 0.2]))
    head = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(3))
    hidden = p.requires_grad_()
    value = distributions.divergence(head, hidden, q)
    assert value.tolist() == pytest.approx([0.025815], abs=1e-6)
    [slope] = torch.autograd.grad(value.sum(), hidden)
    assert slope[0].tolist() == pytest.approx([0.1, -0.1, 0], abs=1e-6)


@both_losses
def test_models_with_another_head_are_refused(
    loss: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(GraniteConfig(logits_scaling=8.0, **SMALL))
    plan = make_plan(loss)
    with (
        preserved(model),
        pytest.raises(InputError, match=f"^method={loss.name} needs .* as granite$") as no,
    ):
        other = LoadedModel(model, base.tokenizer)
        make_trainer(plan, other, frozen_source(plan, tokenised), tmp_path, [])
    assert "\n" not in str(no.value)


def test_an_old_trl_is_refused(
    monkeypatch: pytest.MonkeyPatch, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    monkeypatch.setattr(distributions, "ChunkedDivergenceFunction", None)
    plan = make_plan(ASFT)
    with preserved(base.model), pytest.raises(InputError, match=r"^method=asft needs trl>=1\.16$"):
        make_trainer(plan, base, frozen_source(plan, tokenised), tmp_path, [])
    with preserved(base.model):
        assert make_trainer(make_plan(EAFT), base, frozen_source(plan, tokenised), tmp_path, [])
