"""What an adapter in memory says of itself."""

from __future__ import annotations

import pytest
import torch

from losslens.models.trained_weights import changes_weights

pytestmark = pytest.mark.fast


def test_an_update_of_zero_does_not_change_the_weights() -> None:
    """B = 0, as in the initial adapter, and after training with a learning rate of 0."""
    model = torch.nn.ModuleDict(
        {n: torch.nn.ModuleDict({f"lora_{side}": torch.nn.Linear(2, 2, bias=False) for side in "AB"}) for n in "ab"}
    )
    for module in model.values():
        torch.nn.init.zeros_(module["lora_B"].weight)
    assert not changes_weights(model)
    torch.nn.init.eye_(model["b"]["lora_B"].weight)
    assert changes_weights(model)
