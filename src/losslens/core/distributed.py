"""The processes that train one run together: who they are, and how they stay in step. torch comes when it is needed.

A launcher (torchrun, a Slurm step) starts the same command several times and tells each process in its environment who
it is. All of them go through the same jobs in the same order. The main one alone decides and writes; the others wait
for its orders, train along, and wait again. They wait at torch's key-value store, however long the main process samples
and scores; a collective operation would give up after half an hour.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any

from losslens.core.errors import DivergedError, InputError, ProcessError, first_line
from losslens.core.preemption import Preempted

_GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILURE = "failure"
# What all processes meet at the same step, so that they are still in step when they have met it.
_MET_BY_ALL = (DivergedError, Preempted)


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process among them."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process among those of its machine: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that decides, writes and tells."""
    return rank() == 0


class _Place:
    """Where this process is: all are at the same place when they speak of the same thing."""

    job = 0  # of the command
    point = 0  # of the job: how often all have met in it
    told = False  # by the main process, in this job
    desynchronised = False


@lru_cache(maxsize=1)
def _store() -> Any:
    missing = [name for name in _GIVEN if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={world_size()} processes, but {', '.join(missing)} not set: start them with torchrun"
        )
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    return PrefixStore("losslens", next(rendezvous("env://"))[0])


def _say(key: str, value: Any) -> None:
    _store().set(key, json.dumps(value))


def _hear(key: str) -> Any:
    """What was said, as soon as it is.

    Raises:
        ProcessError: Another process failed instead, or took the store with it.
    """
    store, pause = _store(), 0.002
    try:
        while not store.check([key]):
            if store.check([_FAILURE]):
                _Place.desynchronised = True
                raise _told_by(store.get(_FAILURE).decode())
            time.sleep(pause)
            pause = min(1.3 * pause, 0.5)
        return json.loads(store.get(key))
    except RuntimeError as error:  # torch's, when nobody is at the other end
        _Place.desynchronised = True
        raise ProcessError("the main process has ended") from error


def _told_by(text: str) -> ProcessError:
    failure = json.loads(text)
    error = ProcessError(failure["error"])
    error.add_note(failure["traceback"])
    return error


@contextmanager
def job_scope() -> Iterator[None]:
    """One job of the command. Whatever comes of it, the others then know whether they are needed for it."""
    if world_size() == 1:
        yield
        return
    _store()
    _Place.job, _Place.point, _Place.told = _Place.job + 1, 0, False
    try:
        yield
        if is_main() and not _Place.told:
            _say(f"{_Place.job}/orders", None)
    except BaseException as error:
        _first_failure(error)
        raise


def wait_for_plan() -> dict[str, str] | None:
    """What the main process said when it began `lockstep`; None when it ended the job without.

    Raises:
        ProcessError: It failed, or is gone.
    """
    said: dict[str, str] | None = _hear(f"{_Place.job}/orders")
    return said


@contextmanager
def lockstep(said: dict[str, str] | None = None) -> Iterator[None]:
    """Runs a block in all processes together; `said` is the main process's plan, which `wait_for_plan` returns there.

    A process that raises inside leaves the others waiting for it, so the command ends (`desynchronised`). Divergence
    and preemption do not count: all processes see the same numbers and stop at the same step.

    Raises:
        ProcessError: Another process failed first.
    """
    if world_size() == 1:
        yield
        return
    if is_main():
        _say(f"{_Place.job}/orders", said)
        _Place.told = True
    try:
        try:
            yield
        except _MET_BY_ALL:
            _disconnect()
            raise
        _disconnect()
    except _MET_BY_ALL:
        raise
    except BaseException as error:
        _Place.desynchronised = True
        cause = _first_failure(error)
        if cause is not None and isinstance(error, Exception):
            # What was raised here, a broken connection say, only follows from it.
            raise cause from error
        raise


def desynchronised() -> bool:
    """Whether the processes are no longer in step, so that this one must end."""
    return _Place.desynchronised


def _first_failure(error: BaseException) -> ProcessError | None:
    """Tells the others what was raised here, unless one of them was first: then what that one told."""
    said = {
        "error": f"process {rank()}: {type(error).__name__}: {first_line(error)}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    with suppress(RuntimeError):  # the store is gone with the process that held it
        first = _store().compare_set(_FAILURE, "", json.dumps(said)).decode()
        if json.loads(first) != said:
            return _told_by(first)
    return error if isinstance(error, ProcessError) else None


def barrier() -> None:
    """Waits until all processes are here; does nothing for one.

    Raises:
        ProcessError: One of them failed instead.
    """
    if world_size() == 1:
        return
    _Place.point += 1
    key = f"{_Place.job}/{_Place.point}"
    if _store().add(f"{key}/here", 1) == world_size():
        _say(key, None)
    _hear(key)


def broadcast(value: Any) -> Any:
    """The main process's `value`, which goes into JSON, for all.

    Raises:
        ProcessError: It failed instead.
    """
    if world_size() == 1:
        return value
    _Place.point += 1
    key = f"{_Place.job}/{_Place.point}"
    if is_main():
        _say(key, value)
    return _hear(key)


def init_process_group(backend: str) -> None:
    """Lets the processes exchange gradients over `backend`, until the end of `lockstep`.

    A group a job: between jobs nobody waits in it, and its memory is free while the main process scores.
    """
    if world_size() == 1:
        return
    from torch import distributed

    barrier()  # some may take longer to load the base than a collective waits
    distributed.init_process_group(
        backend, store=distributed.PrefixStore(f"{_Place.job}/group", _store()), rank=rank(), world_size=world_size(),
        timeout=timedelta(minutes=30),
    )  # fmt: skip


def _disconnect() -> None:
    from torch import distributed

    barrier()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def close_store() -> None:
    """Called at the end of the command: the main process may hold the store, so it goes last."""
    if world_size() == 1 or not _Place.job:
        return
    with suppress(RuntimeError):
        if not is_main():
            _say(f"left/{rank()}", None)
            return
        deadline = time.monotonic() + 60
        others = [f"left/{number}" for number in range(1, world_size())]
        while not _store().check(others) and time.monotonic() < deadline:
            time.sleep(0.05)
