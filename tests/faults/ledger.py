"""Record of the injected faults: each one's class, what exactly was done, and how the tool came through it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

Outcome = Literal["same bytes", "clear line", "traceback", "different result", "wrong status", "left over", "hang"]
ACCEPTED: tuple[Outcome, ...] = ("same bytes", "clear line")


def record(kind: str, fault: str, outcome: Outcome, detail: str = "") -> None:
    """Records a fault, and fails the test if the tool did not come through it.

    Args:
        kind: Class of the fault, one row of the table in docs/guarantees.md: `SIGKILL at a write`, `flipped byte`, …
        fault: What was done, in so few words that it can be done again: command, file, operation, seed.
        outcome: `same bytes`: the same command ended in what an undisturbed one gives. `clear line`: status 2 (or 1 for
            a run that failed), one line that names file or field, nothing lost. All others are defects.
        detail: What is needed to look into a defect.
    """
    file = os.environ.get("LOSSLENS_FAULTS")  # `make faults` counts what stands in it
    if file:
        line = json.dumps({"kind": kind, "fault": fault, "outcome": outcome})
        with Path(file).open("a", encoding="utf-8") as lines:  # one short write: lines do not mix
            lines.write(f"{line}\n")
    assert outcome in ACCEPTED, f"{kind}: {fault}: {outcome}\n{detail}"
