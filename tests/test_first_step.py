"""Losses that are one loss at the base: their first AdamW step is the same, since AdamW does not see scale.

All in float64, where a gradient near 0 keeps its sign.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from losslens.losses import Loss
from losslens.losses.cal_dpo import CalDpo
from losslens.losses.dpo import Dpo, LossType
from losslens.losses.ipo import Ipo
from losslens.losses.orpo import Orpo
from losslens.losses.rpo import Rpo
from losslens.losses.simpo import SimPo
from losslens.models.adapters import initial_adapter
from losslens.models.loading import LoadedModel, load_model
from losslens.training.run import TrainingPlan
from tests.conftest import LORA, base_source
from tests.test_trainers import first_step, trainer_of, weights_of


def dpo(loss_type: LossType, **options: Any) -> Dpo:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # robust is unbounded
        return Dpo(name="dpo", loss_type=loss_type, **options)


# Losses with the same token weights at the base, up to one factor. Those of different classes start differently.
CLASSES: dict[str, list[Loss]] = {
    # ±1 on the tokens of the chosen and the rejected completion.
    "pairs": [
        *(dpo(kind) for kind in ("sigmoid", "hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "exo_pair")),
        dpo("robust"),
        dpo("sigmoid", beta=2.0),
        CalDpo(name="cal_dpo"),
        Ipo(name="ipo", form="summed"),
    ],
    # ±1/|y|.
    "pairs per token": [dpo("sigmoid_norm"), dpo("ipo"), Ipo(name="ipo", tau=0.5)],
    # The rest, each alone: −1 times the first class,
    "discopop": [dpo("discopop")],
    # −1 on the rejected tokens only,
    "apo_down": [dpo("apo_down")],
    # and weights that depend on lengths or on the base's probabilities.
    "ld_alpha": [dpo("sigmoid", ld_alpha=0.5)],
    "simpo": [SimPo(name="simpo")],
    "rpo": [Rpo(name="rpo")],
    "orpo": [Orpo(name="orpo")],
}


@pytest.fixture(scope="module")
def base64() -> LoadedModel:
    loaded = load_model(base_source())
    return LoadedModel(loaded.model.double(), loaded.tokenizer)


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
    for one, other in combinations(CLASSES, 2):
        assert relative_difference(step(CLASSES[one][0]), step(CLASSES[other][0])) > 0.1, (one, other)


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
