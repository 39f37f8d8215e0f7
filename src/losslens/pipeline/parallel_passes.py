"""Forward passes of an analysis in several processes on this machine, one per device (`hydra/launcher=local`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from losslens.analysis.function_space import Share
from losslens.core.errors import InputError, UnavailableError, WorkerDiedError
from losslens.scheduling.local.devices import Device
from losslens.scheduling.local.live import printer
from losslens.scheduling.local.pool import Pool, run_all


@contextmanager
def sharing(devices: Sequence[Device]) -> Iterator[Share | None]:
    """Yields a function that calls another with each of several arguments, in workers; None without devices.

    The workers stay until the block ends, each with the base that it has loaded. The function raises the first error
    that a call has raised, and `WorkerDiedError` if a worker was killed twice.
    """
    if not devices:
        yield None
        return
    with Pool(_call, devices, printer()) as pool:

        def share(function: Callable[[Any], None], arguments: Sequence[Any]) -> None:
            for task in run_all(pool, [(function, argument) for argument in arguments]):
                if task.death:
                    raise WorkerDiedError(f"{arguments[task.key]}: {task.death}")
                if task.result is not None:
                    raise task.result

        yield share


def _call(task: tuple[Callable[[Any], None], Any]) -> InputError | None:
    """Calls a function in a worker; returns its error."""
    function, argument = task
    try:
        function(argument)
    except InputError as error:
        return (UnavailableError if isinstance(error, UnavailableError) else InputError)(str(error))
    return None
