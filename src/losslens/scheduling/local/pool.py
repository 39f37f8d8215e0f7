"""A pool of worker processes, one per device. The death of a worker ends its task and nothing else.

The executors of the standard library and of loky give up all tasks when one of their processes is killed, and
submitit's starts a process per task, which would load the base again for each run. Hence `multiprocessing`, with a pipe
for each worker.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from losslens.core.commands import called_subcommand
from losslens.scheduling.local.devices import Device
from losslens.scheduling.local.worker import work
from losslens.scheduling.status import describe_exit

# A fork of a process that has threads or has used CUDA may hang.
CONTEXT: Any = multiprocessing.get_context("spawn")


MAX_DEATHS = 2  # of the workers of one task, before it is given up


@dataclass(frozen=True)
class Ended:
    """A task that has ended.

    Attributes:
        key: Key of the task.
        result: What the function returned.
        death: How the worker died, if it did; then there is no result.
    """

    key: int
    result: Any = None
    death: str = ""


class Pool:
    """Worker processes that call one function, one task at a time on each device.

    Leaving the `with` block ends the workers: normally when they are idle; with an exception, by SIGTERM, which lets
    runs write a checkpoint. Ctrl-C while that happens kills them.

    Args:
        function: What is done with each task; it and the tasks must be picklable.
        devices: The devices.
        say: Called with each line that a worker prints, and whether it was printed on stderr.
    """

    def __init__(
        self, function: Callable[[Any], Any], devices: Sequence[Device], say: Callable[[str, bool], None]
    ) -> None:
        self._function, self._say = function, say
        self._workers: dict[Device, _Worker | None] = dict.fromkeys(devices)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None:
            self._say("stopping after the current steps, with checkpoints; Ctrl-C again kills the processes", True)
        for worker in self._living():
            worker.stop(at_once=kind is not None)
        try:
            while self._living():
                self._forward(0.2)
        except KeyboardInterrupt:
            for worker in self._living():
                worker.process.kill()
                worker.process.join()
            raise

    @property
    def working(self) -> dict[int, Device]:
        """The device of each task in work, by the key of the task."""
        return {
            worker.key: device
            for device, worker in self._workers.items()
            if worker is not None and worker.key is not None
        }

    @property
    def free(self) -> list[Device]:
        """Devices without a task."""
        return [device for device, worker in self._workers.items() if worker is None or worker.key is None]

    def start(self, device: Device, key: int, task: Any) -> None:
        """Starts a task on a free device."""
        worker = self._workers[device]
        if worker is None or not worker.process.is_alive():
            self._workers[device] = worker = _Worker(self._function, device)
        worker.key = key
        with suppress(OSError):  # killed meanwhile, which `wait` finds out
            worker.tasks.send(task)

    def wait(self, seconds: float) -> list[Ended]:
        """Waits until a task ends, at most for some seconds, and returns those that have ended."""
        self._forward(seconds)
        ended = []
        for device, worker in self._workers.items():
            if worker is None or (key := worker.key) is None:
                continue
            try:
                if worker.tasks.poll():
                    ended.append(Ended(key, worker.tasks.recv()))
                    worker.key = None
                    continue
            except (EOFError, OSError):
                worker.process.join()
            if not worker.process.is_alive():
                worker.forward(self._say)
                code = worker.process.exitcode
                ended.append(Ended(key, death=describe_exit(128 - code if code < 0 else code)))
                self._workers[device] = None
        return ended

    def _living(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker is not None and worker.process.is_alive()]

    def _forward(self, seconds: float) -> None:
        """Waits until something happens, and passes on what the workers print."""
        workers = [worker for worker in self._workers.values() if worker is not None]
        busy = [source for worker in self._living() for source in (worker.process.sentinel, worker.tasks)]
        if not busy:
            time.sleep(seconds)
        elif any(worker.forward(self._say) for worker in workers):
            return
        else:
            wait([*busy, *(pipe for worker in workers for pipe in worker.open)], seconds)
        for worker in workers:
            worker.forward(self._say)


def run_all(pool: Pool, tasks: Sequence[Any]) -> list[Ended]:
    """Runs tasks in a pool; one whose worker dies is tried once more.

    Args:
        pool: The pool, which does nothing else meanwhile.
        tasks: The tasks; their numbers are the keys.

    Returns:
        The ended tasks, in their order.
    """
    waiting, deaths = deque(range(len(tasks))), Counter[int]()
    ended: dict[int, Ended] = {}
    while waiting or pool.working:
        while waiting and pool.free:
            number = waiting.popleft()
            pool.start(pool.free[0], number, tasks[number])
        for task in pool.wait(1.0):
            deaths[task.key] += bool(task.death)
            if task.death and deaths[task.key] < MAX_DEATHS:
                waiting.appendleft(task.key)
            else:
                ended[task.key] = task
    return [ended[key] for key in sorted(ended)]


class _Worker:
    """A worker process, seen from the parent."""

    def __init__(self, function: Callable[[Any], Any], device: Device) -> None:
        self.key: int | None = None
        self.tasks, theirs = CONTEXT.Pipe()
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self.open: list[Connection] = [reader for reader, _ in pipes]
        self._parts = dict.fromkeys(self.open, b"")
        self._is_error = dict(zip(self.open, (False, True), strict=True))
        writers = [writer for _, writer in pipes]
        for reader in self.open:
            os.set_blocking(reader.fileno(), False)
        arguments = (function, theirs, writers, self.open, called_subcommand())
        self.process = CONTEXT.Process(target=work, args=arguments, name=device.name)
        # The parent shows how far each run is; progress bars of several processes would overwrite each other.
        with _environment({**device.environment, "TQDM_DISABLE": "1"}), _interrupts_blocked():
            self.process.start()
        for pipe in (theirs, *writers):
            pipe.close()

    def stop(self, at_once: bool) -> None:
        """Ends the worker: at once as a scheduler does, or after its task."""
        if at_once:
            self.process.terminate()
        else:
            with suppress(OSError):
                self.tasks.send(None)

    def forward(self, say: Callable[[str, bool], None]) -> bool:
        """Passes on the lines that the worker has printed; returns True if there were any."""
        found = False
        for pipe in list(self.open):
            try:
                text = os.read(pipe.fileno(), 1 << 16)
            except BlockingIOError:
                continue
            if not text:
                self.open.remove(pipe)
            *lines, self._parts[pipe] = (self._parts[pipe] + text).split(b"\n")
            for line in lines:
                found = True
                # Without the progress bars of libraries, which overwrite themselves.
                say(line.rpartition(b"\r")[2].decode("utf-8", errors="replace"), self._is_error[pipe])
        return found


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables for a process that is started in the block: some are read before any code of it runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks SIGINT, also in a process that is started in the block, for good: it imports for seconds."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
