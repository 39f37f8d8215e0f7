"""The GPUs that this process can use."""

from __future__ import annotations

import os
from pathlib import Path


def visible_gpus() -> list[str]:
    """Returns the GPUs that torch can use, as `CUDA_VISIBLE_DEVICES` names them: numbers or UUIDs."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def has_several_gpus() -> bool:
    """Returns True if torch can use several GPUs; torch is imported only where the system has several."""
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1 and len(visible_gpus()) > 1
