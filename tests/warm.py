"""Becomes the entry scripts: `warm.py FD` imports what they import, once, and forks for each one that is asked for.

A request is a line of JSON on stdin; the answer is the number of the copy, on the open file FD (libraries print on
stdout when they are imported: wandb does with WANDB_MODE=offline). The copy is a process of its own, which nothing has
run in: it leads its own group, gets its own arguments, environment, folder and output, and ends as any interpreter
does. Its exit status is then in the file that the request names.
"""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import losslens.cli.app  # first, as in the scripts: it sets what other libraries read when they are imported

# isort: split
import numpy as np
import openai  # noqa: F401
import reasoning_gym  # noqa: F401
from wandb.sdk.data_types._private import MEDIA_TMP

import losslens.analysis.behaviour
import losslens.analysis.pipeline
import losslens.evaluation.score
import losslens.measures.connectivity
import losslens.pipeline.sweep
import losslens.report.figures.write
import losslens.report.page
import losslens.report.paper_tables
import losslens.sampling.server
import losslens.scheduling.local.pool
import losslens.scheduling.monitor
import losslens.training.run

sys.path.append(str(Path(__file__).parents[1]))
from tests.faults import shim


def requested() -> dict[str, Any]:
    """Waits for requests; only the copies return."""
    gc.freeze()  # a copy's garbage collector leaves alone what is shared: it would copy it all, in two seconds
    running: dict[int, str] = {}

    def ended(*_: object) -> None:  # comes again while it runs, where two end at once
        while running:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            file = running.pop(child, None)
            if file is None:  # not one of ours
                continue
            with suppress(OSError):  # nobody waits any more
                Path(f"{file}.part").write_text(str(os.waitstatus_to_exitcode(status)))
                Path(f"{file}.part").replace(file)

    signal.signal(signal.SIGCHLD, ended)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until its number is known here
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, also in the background
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            os.setsid()
            os.write(int(sys.argv[1]), b"%d\n" % os.getpid())
            os.close(int(sys.argv[1]))
            return request
        running[child] = request["status"]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Makes this process what the command would have started."""
    files = (os.devnull, os.O_RDONLY), (request["stdout"], os.O_WRONLY), (request["stderr"], os.O_WRONLY)
    for number, (name, mode) in enumerate(files):
        os.dup2(os.open(name, mode), number)
    os.environ.clear()
    os.environ.update(request["environment"])
    np.random.seed()  # as another process would have another
    # wandb made a folder for media when it was imported, which the first copy to end would take from the rest.
    MEDIA_TMP._finalizer.detach()
    MEDIA_TMP.name = tempfile.mkdtemp("wandb-media")
    os.chdir(request["folder"])
    sys.argv = request["command"]
    more = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    first = "" if sys.argv[0] == "-m" else str(Path(sys.argv[0]).parent.resolve())
    sys.path[:1] = [first, *more]


def leave(status: int) -> NoReturn:
    """Ends as an interpreter does, without taking thousands of modules apart: that takes longer than most commands."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):
            stream.flush()  # type: ignore[union-attr]
    os._exit(status)


# A worker of `hydra/launcher=local` is then a copy as well.
losslens.scheduling.local.pool.CONTEXT = multiprocessing.get_context("fork")

if __name__ == "__main__":
    become(requested())
    shim.install()
    status: object = 0
    try:
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    if isinstance(status, (int, type(None))):
        leave(status or 0)
    sys.exit(status)  # type: ignore[arg-type]
