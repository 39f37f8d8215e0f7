"""The devices of this machine that runs are shared out to, one worker process each."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from losslens.core import distributed
from losslens.core.cores import available_cores
from losslens.core.errors import InputError
from losslens.models.devices import visible_gpus

_OPTION = "hydra.launcher.workers"


@dataclass(frozen=True)
class Device:
    """Device of one worker.

    Attributes:
        name: `GPU 0`, or `CPU 1` for the second share of the cores.
        environment: Variables of the worker's environment: its GPU, or its number of threads.
    """

    name: str
    environment: dict[str, str] = field(hash=False)


def choose_devices(workers: object) -> list[Device]:
    """Returns the devices of the workers: the visible GPUs, or equal shares of the cores if there is none.

    An `OMP_NUM_THREADS` of the user's is the number of threads of each worker, as it is of each process elsewhere.

    Args:
        workers: Their number; None for one per GPU.

    Raises:
        InputError: The number is invalid, larger than the number of devices, or missing where there is no GPU.
    """
    if distributed.world_size() > 1:
        raise InputError("hydra/launcher=local starts its own processes: start it with python, not with torchrun")
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool) or workers < 1):
        raise InputError(f"{_OPTION}={workers}: the number of runs at once, at least 1")
    gpus = visible_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None and not gpus:
        raise InputError(f"hydra/launcher=local: no GPU here; {_OPTION}=N shares the {cores} cores among N runs")
    available, kind = (len(gpus), "visible GPUs") if gpus else (cores, "cores")
    if workers is not None and workers > available:
        raise InputError(f"{_OPTION}={workers}: more than the {available} {kind} of this machine")
    if gpus:
        return [Device(f"GPU {gpu}", {"CUDA_VISIBLE_DEVICES": gpu}) for gpu in gpus[:workers]]
    assert workers is not None
    threads = available_cores() if os.environ.get("OMP_NUM_THREADS") else cores // workers
    return [Device(f"CPU {number}", {"OMP_NUM_THREADS": str(threads)}) for number in range(workers)]
