"""Losses that say they are bounded below come to rest where nothing but the data holds them; the others run away."""

from __future__ import annotations

import pytest
import torch

from losslens.losses import Batch
from tests.test_losses import total, variants
from tests.test_losses_rollouts import example


@pytest.mark.slow
@torch.no_grad()
def test_bounded_losses_come_to_rest_and_others_run_away() -> None:
    """Adam on free probabilities of `PAIR`, along the weights.

    A bounded loss may end where it lets go (e^h → 0), where its target is, or at probability 1.
    """
    losses = variants()
    some = torch.tensor([[0.7, 0.4, 0.0], [0.2, 0.3, 0.9]], dtype=torch.float64)
    step = {"mismatched_log_ratio": torch.tensor(0.1, dtype=torch.float64)}
    facts = {"step": step, "top_entropy": some, "divergence": some, "pairs": torch.tensor([[0, 1]])}
    batches = [example(loss, **facts) for loss in losses.values()]
    start = torch.log(torch.expm1(-batches[0].logps.detach()).where(batches[0].mask, 1))
    free = start.expand(len(losses), 2, 3).clone()  # log π = −log(1 + e^free)
    optimiser = torch.optim.Adam([free], lr=2.0)
    pulls = []
    for _ in range(500):
        logps = -torch.nn.functional.softplus(free) * batches[0].mask
        moved = [Batch(**{**vars(batch), "logps": each}) for batch, each in zip(batches, logps, strict=True)]
        pairs = zip(losses.values(), moved, strict=True)
        weights = torch.stack([loss.weights(batch).expand(2, 3) for loss, batch in pairs])
        free.grad = weights * free.sigmoid() * batches[0].mask
        pulls.append(free.grad.abs().amax(dim=(1, 2)))
        optimiser.step()
    rest = (pulls[-1] / pulls[0]).tolist()
    for (name, loss), batch, ratio in zip(losses.items(), moved, rest, strict=True):
        if loss.bounded:
            assert ratio < 0.02, (name, ratio)
        else:
            assert ratio > 0.2, (name, ratio)
            assert total(loss, batch).item() < -30, name
