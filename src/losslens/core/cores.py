"""How many cores this process may use, without torch."""

from __future__ import annotations

import os


def available_cores() -> int:
    """The first number of `OMP_NUM_THREADS`, which a Slurm job sets; else the cores that the process may run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
