"""Losses that say they are bounded below converge where nothing but the data holds them; the others run away."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch

from losslens.losses import Loss, builtin_losses
from losslens.losses.dpo import LossType
from losslens.losses.ipo import Ipo
from losslens.losses.pairs import PairLoss
from tests.test_losses import total
from tests.test_losses_pairs import dpo, example

LOSSES: dict[str, Loss] = {
    **{f"dpo {loss_type}": dpo(loss_type) for loss_type in get_args(LossType)},
    **{
        name: kind(name=name) for name, kind in builtin_losses().items() if issubclass(kind, PairLoss) and name != "dpo"
    },
    "ipo summed": Ipo(name="ipo", form="summed"),
}


def minimised(loss: Loss, steps: int) -> list[float]:
    """Ten values of the loss on the example while Adam moves the log-probability of each token on its own.

    Each is −softplus(x), so that it stays a log-probability; Adam's learning rate is .02.
    """
    batch = example()
    mask = batch.mask.numpy()
    x = np.log(np.expm1(-batch.logps.detach().numpy(), where=mask, out=np.ones(mask.shape)))
    first, second, values = np.zeros_like(x), np.zeros_like(x), []
    for step in range(1, steps + 1):
        now = dataclasses.replace(batch, logps=torch.from_numpy(np.where(mask, -np.logaddexp(0, x), 0)))
        # dL/dx = w·σ(x), as −∂L/∂log π = w and ∂log π/∂x = −σ(x).
        gradient = np.where(mask, loss.weights(now).numpy() * np.exp(-np.logaddexp(0, -x)), 0)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        x = x - 0.02 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-12)
        if step % (steps // 10) == 0:
            values.append(total(loss, now).item())
    return values


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_bounded_losses_converge_and_others_run_away(loss: Loss) -> None:
    """In its last 1000 of 10,000 steps a bounded loss no longer falls; an unbounded one falls as fast as before."""
    falls = -np.diff(minimised(loss, 10_000))
    if loss.bounded:
        assert abs(falls[-1]) < 1e-3
    else:
        assert falls[-1] > 0.9 * falls[-4] > 0.1
