"""Number of CPU cores available to this process, without torch."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Returns the first number of `OMP_NUM_THREADS` (set in Slurm jobs), else the size of the CPU affinity."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
