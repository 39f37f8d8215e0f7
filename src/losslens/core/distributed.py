"""The processes that train one run together: rank, world size and synchronisation. torch is imported only if needed.

A launcher (torchrun, a Slurm step) starts the same command several times and sets each process's rank in its
environment. All processes go through the same jobs in the same order. The main process (rank 0) alone makes decisions
and writes files; the others wait for its plan, train along, and wait again. They poll torch's key-value store, which
works however long the main process samples and scores; a collective operation would time out after half an hour.
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
from pathlib import Path
from typing import Any

from losslens.core.errors import DivergedError, InputError, ProcessError, first_line
from losslens.core.files import read_json, write_json
from losslens.core.preemption import Preempted

_REQUIRED_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Names the file through which the main process tells the others its port, instead of MASTER_PORT: a port that is chosen
# before the main process listens on it may be taken meanwhile, by any connection of the machine.
PORT_FILE = "LOSSLENS_PORT_FILE"
_PATIENCE = 300.0  # seconds for which processes wait for each other to start; torch's own limit
_FAILURE = "failure"
# Raised by all processes at the same step, so they stay synchronised.
_RAISED_BY_ALL = (DivergedError, Preempted)


def world_size() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Returns the rank of this process."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_rank() -> int:
    """Returns the rank of this process on its machine, which is the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """True in the main process, which makes decisions, writes files and prints."""
    return rank() == 0


class _State:
    """Position of this process in the command; keys in the store contain it, so that all processes use the same."""

    job = 0
    sync_point = 0  # barriers and broadcasts in this job so far
    plan_sent = False  # by the main process, in this job
    desynchronised = False


@lru_cache(maxsize=1)
def _store() -> Any:
    port_file = os.environ.get(PORT_FILE)
    needed = [name for name in _REQUIRED_ENV if name != "MASTER_PORT" or not port_file]
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise InputError(
            f"WORLD_SIZE={world_size()}, but {', '.join(missing)} not set; start the processes with torchrun"
        )
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store = _store_on_free_port(Path(port_file)) if port_file else next(rendezvous("env://"))[0]
    return PrefixStore("losslens", store)


def _store_on_free_port(port_file: Path) -> Any:
    """Returns a store on a port that the operating system gives the main process, once all processes use it.

    Raises:
        ProcessError: A process did not start.
    """
    from torch.distributed import TCPStore

    address, others = os.environ["MASTER_ADDR"], [f"started/{number}" for number in range(1, world_size())]
    if is_main():
        store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        write_json(port_file, {"port": store.port})
        try:
            store.wait(others, timedelta(seconds=_PATIENCE))
        except RuntimeError as error:
            missing = [name for name in others if not store.check([name])]
            raise ProcessError(f"{len(missing)} of {world_size()} processes did not start") from error
        finally:
            port_file.unlink(missing_ok=True)
    else:
        deadline = time.monotonic() + _PATIENCE
        while not port_file.exists():
            if time.monotonic() > deadline:
                raise ProcessError(f"{port_file}: the main process did not start")
            time.sleep(0.05)
        store = TCPStore(address, read_json(port_file)["port"])
        store.set(f"started/{rank()}", "")
    os.environ["MASTER_PORT"] = str(store.port)
    return store


def _publish(key: str, value: Any) -> None:
    _store().set(key, json.dumps(value))


def _receive(key: str) -> Any:
    """Waits for the value that another process publishes under `key`, and returns it.

    Raises:
        ProcessError: Another process failed, or the one that hosts the store has ended.
    """
    store, pause = _store(), 0.002
    try:
        while not store.check([key]):
            if store.check([_FAILURE]):
                _State.desynchronised = True
                raise _process_error(store.get(_FAILURE).decode())
            time.sleep(pause)
            pause = min(1.3 * pause, 0.5)
        return json.loads(store.get(key))
    except RuntimeError as error:  # from torch: the connection to the store is lost
        _State.desynchronised = True
        raise ProcessError("the main process has ended") from error


def _process_error(text: str) -> ProcessError:
    failure = json.loads(text)
    error = ProcessError(failure["error"])
    error.add_note(failure["traceback"])
    return error


@contextmanager
def job_scope() -> Iterator[None]:
    """Encloses one job of the command; if the job ends without `lockstep`, tells the other processes so."""
    if world_size() == 1:
        yield
        return
    _store()
    _State.job, _State.sync_point, _State.plan_sent = _State.job + 1, 0, False
    try:
        yield
        if is_main() and not _State.plan_sent:
            _publish(f"{_State.job}/plan", None)
    except BaseException as error:
        _first_failure(error)
        raise


def wait_for_plan() -> dict[str, str] | None:
    """Returns the plan with which the main process entered `lockstep`; None if it ended the job without doing so.

    Raises:
        ProcessError: The main process failed or has ended.
    """
    plan: dict[str, str] | None = _receive(f"{_State.job}/plan")
    return plan


@contextmanager
def lockstep(plan: dict[str, str] | None = None) -> Iterator[None]:
    """Runs a block in all processes together; `wait_for_plan` returns the main process's `plan` in the others.

    An exception in one process would leave the others waiting for it, so the command ends (`desynchronised`).
    Divergence and preemption are exempt: all processes see the same numbers and stop at the same step.

    Raises:
        ProcessError: Another process failed first.
    """
    if world_size() == 1:
        yield
        return
    if is_main():
        _publish(f"{_State.job}/plan", plan)
        _State.plan_sent = True
    try:
        try:
            yield
        except _RAISED_BY_ALL:
            _disconnect()
            raise
        _disconnect()
    except _RAISED_BY_ALL:
        raise
    except BaseException as error:
        _State.desynchronised = True
        cause = _first_failure(error)
        if cause is not None and isinstance(error, Exception):
            # The exception raised here, such as a lost connection, is only a consequence.
            raise cause from error
        raise


def desynchronised() -> bool:
    """True if the processes are no longer synchronised, so that this one must end."""
    return _State.desynchronised


def _first_failure(error: BaseException) -> ProcessError | None:
    """Publishes this process's failure; if another process failed first, returns that failure instead."""
    failure = {
        "error": f"process {rank()}: {type(error).__name__}: {first_line(error)}",
        "traceback": "".join(traceback.format_exception(error)),
    }
    with suppress(RuntimeError):  # the process that hosts the store has ended
        first = _store().compare_set(_FAILURE, "", json.dumps(failure)).decode()
        if json.loads(first) != failure:
            return _process_error(first)
    return error if isinstance(error, ProcessError) else None


def barrier() -> None:
    """Waits until all processes have called it; returns at once if there is only one.

    Raises:
        ProcessError: Another process failed.
    """
    if world_size() == 1:
        return
    _State.sync_point += 1
    key = f"{_State.job}/{_State.sync_point}"
    if _store().add(f"{key}/arrived", 1) == world_size():
        _publish(key, None)
    _receive(key)


def broadcast(value: Any) -> Any:
    """Returns the main process's `value`, which must be JSON-serialisable, in all processes.

    Raises:
        ProcessError: Another process failed.
    """
    if world_size() == 1:
        return value
    _State.sync_point += 1
    key = f"{_State.job}/{_State.sync_point}"
    if is_main():
        _publish(key, value)
    return _receive(key)


def init_process_group(backend: str) -> None:
    """Initialises torch's process group with `backend`, until the end of `lockstep`.

    One group per job: between jobs no process waits in it, and its memory is free while the main process scores.
    """
    if world_size() == 1:
        return
    from torch import distributed

    barrier()  # loading the base may take some processes longer than a collective's timeout
    distributed.init_process_group(
        backend, store=distributed.PrefixStore(f"{_State.job}/group", _store()), rank=rank(), world_size=world_size(),
        timeout=timedelta(minutes=30),
    )  # fmt: skip


def _disconnect() -> None:
    from torch import distributed

    barrier()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def close_store() -> None:
    """Ends the use of the store at the end of the command: the main process, which may host it, ends last."""
    if world_size() == 1 or not _State.job:
        return
    with suppress(RuntimeError):
        if not is_main():
            _publish(f"left/{rank()}", None)
            return
        deadline = time.monotonic() + 60
        others = [f"left/{number}" for number in range(1, world_size())]
        while not _store().check(others) and time.monotonic() < deadline:
            time.sleep(0.05)
