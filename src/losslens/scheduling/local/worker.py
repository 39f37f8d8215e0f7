"""A worker process: does the tasks that it is sent, one after the other, until it is told to stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from losslens.core import preemption
from losslens.core.commands import call_as_installed
from losslens.core.preemption import Preempted
from losslens.core.redaction import guard_streams


def work(
    function: Callable[[Any], Any],
    tasks: Connection,
    output: Sequence[Connection],
    kept: Sequence[Connection],
    subcommand: str,
) -> None:
    """Answers each task with the result of `function`; None ends the worker.

    SIGTERM stops it as a scheduler's signal does: a run that trains writes a checkpoint first. The end of the process
    that started it counts as SIGTERM, so that no worker is left without one.

    Args:
        function: What to do with a task.
        tasks: Receives tasks and sends results.
        output: Pipes that take the place of stdout and stderr.
        kept: Their other ends. As long as this process has them, too, printing does not fail when the parent is killed.
        subcommand: Subcommand of `losslens` that started the parent; empty for a script.
    """
    with suppress(Preempted, EOFError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
        preemption.install_handlers(signal.SIGTERM)
        for descriptor, pipe in zip((1, 2), output, strict=True):
            os.dup2(pipe.fileno(), descriptor)
            pipe.close()
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8", closefd=False) for number in (1, 2))
        guard_streams()
        if subcommand:
            call_as_installed(subcommand)
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        while (task := tasks.recv()) is not None:
            tasks.send(function(task))
    for pipe in kept:
        pipe.close()


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)  # nobody empties the pipes any more
    os.kill(os.getpid(), signal.SIGTERM)
