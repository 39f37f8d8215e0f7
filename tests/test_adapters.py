"""Properties of an adapter's folder, without a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from losslens.models.adapters import changes_weights

pytestmark = pytest.mark.fast


def test_an_update_of_zero_does_not_change_the_weights(tmp_path: Path) -> None:
    """B = 0, as in the initial adapter, and after training with a learning rate of 0."""
    weights = {
        f"m.{n}.lora_{side}.weight": np.full((2, 2), side == "A", dtype=np.float32) for n in "ab" for side in "AB"
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    assert not changes_weights(tmp_path)
    save_file({**weights, "m.b.lora_B.weight": np.eye(2, dtype=np.float32)}, tmp_path / "adapter_model.safetensors")
    assert changes_weights(tmp_path)
