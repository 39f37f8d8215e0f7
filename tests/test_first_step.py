"""Losses that are one loss at the base: their first AdamW step is the same, since AdamW does not see scale.

All in float64, where a gradient near 0 keeps its sign.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from losslens.losses import Loss, builtin_losses
from losslens.losses.a_star_po import AStarPo
from losslens.losses.asft import Asft
from losslens.losses.awr import Awr
from losslens.losses.cal_dpo import CalDpo
from losslens.losses.dft import Dft
from losslens.losses.dpo import Dpo, LossType
from losslens.losses.eaft import Eaft
from losslens.losses.grpo import Grpo
from losslens.losses.ipo import Ipo
from losslens.losses.kto import Kto
from losslens.losses.nft import Nft
from losslens.losses.orpo import Orpo
from losslens.losses.p_alpha import PAlpha
from losslens.losses.redi import Redi
from losslens.losses.rft import Rft
from losslens.losses.rift import Rift
from losslens.losses.rpo import Rpo
from losslens.losses.sft import Sft
from losslens.losses.simpo import SimPo
from losslens.losses.topr import Topr
from losslens.models.adapters import initial_adapter
from losslens.models.loading import LoadedModel
from losslens.training.run import TrainingPlan
from tests.conftest import LORA
from tests.test_trainers import first_step, trainer_of, weights_of


def dpo(loss_type: LossType, **options: Any) -> Dpo:
    return Dpo(name="dpo", loss_type=loss_type, **options)


_BASE: dict[str, Any] = {"behaviour": "base"}
_GRPO: dict[str, Any] = {"name": "grpo", "bias": 0.0, **_BASE}
# Losses that declare one first-step class (`Factors.first_step`): the same token weights at the base, up to one factor.
CLASSES: dict[str, list[Loss]] = {
    "uniform": [Sft(name="sft"), Sft(name="sft", ratio="clip", **_BASE), Sft(name="sft", ratio="cispo", **_BASE)],
    "correct only": [Rft(name="rft"), Rft(name="rft", ratio="clip", **_BASE)],
    "π": [Dft(name="dft"), PAlpha(name="p_alpha", alpha=1), Asft(name="asft")],
    "±1": [
        Kto(name="kto"),
        Kto(name="kto", z0="zero", beta=1.0),
        Topr(name="topr", **_BASE),
        Topr(name="topr", level="geometric", **_BASE),
    ],
    "r − r̄": [
        Grpo(**_GRPO),
        Grpo(**_GRPO, ratio="clip"),
        Grpo(**_GRPO, ratio="cispo"),
        Grpo(**_GRPO, normaliser="constant"),
        Nft(name="nft", **_BASE),
    ],
    "pair ±1": [
        *(dpo(kind) for kind in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "exo_pair")),
        dpo("robust"),
        dpo("sigmoid", beta=2.0),
        CalDpo(name="cal_dpo"),
        Ipo(name="ipo", form="summed"),
    ],
    "pair ±1/|y|": [dpo("sigmoid_norm"), dpo("ipo"), Ipo(name="ipo", tau=0.5)],
}
# Each alone: its first step is that of no other loss.
ALONE: list[Loss] = [
    Awr(name="awr"), Eaft(name="eaft"), Rift(name="rift"), PAlpha(name="p_alpha"), Redi(name="redi"), Grpo(name="grpo"),
    AStarPo(name="a_star_po"), Grpo(**_GRPO, normaliser="sequence"), Nft(name="nft", group_weight="none", **_BASE),
    Kto(name="kto", undesirable_weight=2.0), dpo("discopop"), dpo("apo_down"), dpo("sigmoid", ld_alpha=0.5),
    SimPo(name="simpo"), Rpo(name="rpo"), Orpo(name="orpo"),
]  # fmt: skip


def test_the_classes_are_those_that_the_losses_declare() -> None:
    declared = {name: {loss.factors.first_step for loss in losses if loss.factors} for name, losses in CLASSES.items()}
    assert declared == {name: {name} for name in CLASSES}
    assert {loss.factors.first_step for loss in ALONE if loss.factors} == {""}
    assert {loss.name for losses in (*CLASSES.values(), ALONE) for loss in losses} == set(builtin_losses())


@pytest.fixture(scope="module")
def base64(base: LoadedModel) -> LoadedModel:
    return LoadedModel(copy.deepcopy(base.model).double(), base.tokenizer)


@pytest.fixture(scope="module")
def plan64(
    make_plan: Any, base64: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Loss], TrainingPlan]:
    """Makes the plan of one step, without warm-up, weight decay or clipping."""
    folder = tmp_path_factory.mktemp("init64")
    adapter = initial_adapter(folder, {"sha256": "float64"}, base64.model, LORA, init_seed=7)

    def make(loss: Loss) -> TrainingPlan:
        plan: TrainingPlan = make_plan(
            loss,
            max_steps=1,
            batch_size=8,
            scheduler="constant",
            warmup_ratio=0.0,
            weight_decay=0.0,
            max_grad_norm=1e30,
        )
        return dataclasses.replace(plan, initial_adapter=adapter)

    return make


@pytest.fixture(scope="module")
def step(
    plan64: Any, base64: LoadedModel, uneven: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Loss], torch.Tensor]:
    """Takes the first step of a loss and returns the change of the adapter, flat; each loss once."""

    @cache
    def take(loss: Loss) -> torch.Tensor:
        with trainer_of(plan64(loss), base64, uneven, tmp_path_factory.mktemp("step")) as trainer:
            trainer.args.adam_epsilon = 1e-14
            before = weights_of(trainer)
            trainer.train()
            after = weights_of(trainer)
            return torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])

    return take


def relative_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("members", CLASSES.values(), ids=CLASSES)
def test_the_first_step_is_the_same_within_a_class(members: list[Loss], step: Any) -> None:
    first = step(members[0])
    assert first.norm() > 0
    for loss in members[1:]:
        assert relative_difference(step(loss), first) < 1e-5, loss


def test_the_first_step_differs_between_classes(step: Any) -> None:
    for one, other in combinations([*(losses[0] for losses in CLASSES.values()), *ALONE], 2):
        assert relative_difference(step(one), step(other)) > 0.05, (one, other)


def test_the_first_gradient_of_discopop_is_against_dpos(
    plan64: Any, base64: LoadedModel, uneven: pd.DataFrame, tmp_path: Path
) -> None:
    """Weights of −.0784264 and .05 on the chosen tokens (tests/test_losses.py): −1.568528 times DPO's gradient."""
    gradients = []
    for loss in (dpo("discopop"), dpo("sigmoid")):
        with trainer_of(plan64(loss), base64, uneven, tmp_path / loss.loss_type) as trainer:
            [batch] = first_step(trainer)
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(8)).backward()
            named = sorted(trainer.model.named_parameters())
            gradients.append(torch.cat([p.grad.flatten() for _, p in named if p.grad is not None]))
    ours, theirs = gradients
    assert theirs.norm() > 0
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item() == pytest.approx(-1, abs=1e-10)
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(1.568528, abs=1e-6)
