"""SFT whose steps take as long as $SLOW_SECONDS says, and which fails where $FAIL is set: for tests that stop it."""

from __future__ import annotations

import os
import time
from typing import Literal

from torch import Tensor

from losslens.losses import Batch
from losslens.losses.sft import Sft


class Impostor(Sft):
    """Another loss under SFT's name."""


class SlowSft(Sft):
    """SFT, slowly. The time it takes is not part of who a run is."""

    name: Literal["slow_sft"]  # type: ignore[assignment]

    def terms(self, batch: Batch) -> Tensor:
        time.sleep(float(os.environ.get("SLOW_SECONDS", "0")))
        if os.environ.get("FAIL"):
            raise RuntimeError("this loss was told to fail")
        return super().terms(batch)
