"""Counts what a process writes, and ends it at one of these operations; bends its clock, its locks and its sight.

Loaded by tests/warm.py into a process whose environment has LOSSLENS_SHIM, a JSON object with the fields of `Plan`.
What C++ and Rust write (parquet, safetensors) is not seen, but the fsync and the rename after it are.
"""

from __future__ import annotations

import builtins
import ctypes
import datetime
import errno
import fcntl
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

VARIABLE = "LOSSLENS_SHIM"
BALLAST = ".ballast"
_open, _low = io.open, os.open  # as they are without this file


@dataclass(frozen=True)
class Plan:
    """What is done to a process.

    Attributes:
        root: Folder below which operations count; those elsewhere are left alone.
        log: File outside of `root` to which each operation is appended: number of the process, kind, path.
        at: The operation at which to act, as `[kind, path, number]`: the number-th of this kind on this path, from 1,
            in one process. None: nowhere.
        when: `before` the operation, `after` it, or `torn`: after it, with the second half of its file gone.
        signal: The signal that the process sends itself there, 0 for none.
        once: File that is created when the signal is sent, and without which it is not sent a second time: several
            processes may come to the operation.
        clock: Seconds by which time.time and datetime.now are off from there on (from the start, where `at` is None).
        flock: Name of the error with which fcntl.flock fails, as on a file system without locks: `ENOSYS`.
        late: Seconds for which what one process makes under a new name is hidden from the others, as by an NFS client
            that remembers that there was no such name. It is hidden from what only looks (stat, open for reading,
            listing); the server decides about what changes something, and a client that was told `File exists` asks
            about this name again. Forked processes are on the same client.
        fill: What the file system of `root`, a small one of its own, has no more of from `at` on: `room` or `inodes`.
        namespace: Process in whose mount namespace to work, 0 for one's own.
    """

    root: str
    log: str
    at: tuple[str, str, int] | None = None
    when: str = "before"
    signal: int = 0
    once: str = ""
    clock: float = 0.0
    flock: str = ""
    late: float = 0.0
    fill: str = ""
    namespace: int = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variable that makes a process follow this plan."""
        return {VARIABLE: json.dumps(asdict(self))}


def install() -> None:
    """Makes this process, and those that it forks, follow the plan of the environment."""
    if VARIABLE not in os.environ:
        return
    given = json.loads(os.environ[VARIABLE])
    plan = Plan(**{**given, "at": given["at"] and tuple(given["at"])})
    if plan.namespace:
        _enter_namespace(plan.namespace)
    if plan.clock and plan.at is None:
        _bend_clock(plan.clock)
    if plan.flock:
        _forbid_locks(plan.flock)
    watch = _Watch(plan)
    _wrap_writing(watch)
    if plan.late:
        _hide_new_names(watch)


def operations(log: Path) -> list[tuple[int, str, str]]:
    """Reads the log of a plan: process, kind and path of each operation, in their order."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return [(int(pid), kind, path) for pid, kind, path in (line.split("\t") for line in lines)]


class _Watch:
    """Operations of this process, and the one at which to act."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.root = plan, plan.root.rstrip("/") + "/"
        self.log = os.open(plan.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.pid = self.client = os.getpid()
        self.known: set[str] = set()  # names about which the server has told this client
        self.is_busy = False

    def inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the root, None for another."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        text = os.path.abspath(text)
        return text[len(self.root) :] if text.startswith(self.root) else None

    def call(self, kind: str, path: str | None, function: Callable[[], Any], new: bool = False) -> Any:
        """Calls the function as an operation: counted, logged, and disturbed if it is the one."""
        if path is None or self.is_busy:
            return function()
        self.is_busy = True
        try:
            if self.pid != os.getpid():  # forked
                self.pid, self.counts = os.getpid(), Counter()
            name = stable(path)
            self.counts[kind, name] += 1
            hit = self.plan.at == (kind, name, self.counts[kind, name])
            os.write(self.log, f"{self.pid}\t{kind}\t{name}\n".encode())
            if hit and self.plan.when == "before":
                self._act(path)
            self.is_busy = False
            try:
                if self.plan.late and self.is_hidden(os.path.dirname(path)):
                    raise missing(self.root + path)
                result = function()
                if new and self.plan.late:
                    self._announce(path)
                if kind in ("mkdir", "open", "rename"):
                    self.known.add(path)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    self.known.add(path)
                raise
            finally:  # also after a folder that is there already
                self.is_busy = True
                if hit and self.plan.when != "before":
                    self._act(path)
            return result
        finally:
            self.is_busy = False

    def is_hidden(self, path: str) -> bool:
        """True if another client made the name, or one of its folders, so recently that this one is not shown it."""
        try:
            with _open(f"{self.plan.log}.names", "rb") as file:
                lines = file.read().decode().splitlines()
        except FileNotFoundError:
            return False
        now, own = time.monotonic(), str(self.client)
        made = (line.split("\t") for line in lines)
        late = {name for client, moment, name in made if client != own and now - float(moment) < self.plan.late}
        return any(path == name or path.startswith(f"{name}/") for name in late - self.known)

    def _announce(self, path: str) -> None:
        """Tells the other processes of a name that they do not see yet."""
        with _open(f"{self.plan.log}.names", "ab") as names:
            names.write(f"{self.client}\t{time.monotonic()}\t{path}\n".encode())

    def _act(self, path: str) -> None:
        if self.plan.once:
            try:
                os.close(os.open(self.plan.once, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
        if self.plan.when == "torn":
            file = self.root + path
            os.truncate(file, os.stat(file).st_size // 2)
        if self.plan.fill:
            _fill(Path(self.root), self.plan.fill)
        if self.plan.clock:
            _bend_clock(self.plan.clock)
        if self.plan.signal:
            os.kill(os.getpid(), self.plan.signal)
            if self.plan.signal == signal.SIGKILL:
                signal.pause()


def missing(path: Any) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))


def stable(path: str) -> str:
    """A path without what differs between two processes that do the same: the random part of temporary names."""
    parts = []
    for part in path.split("/"):
        stem, dot, last = part.rpartition(".")
        parts.append(f"{stem.rpartition('.')[0]}.*.tmp" if dot and last == "tmp" and part.startswith(".") else part)
    return "/".join(parts)


def _wrap_writing(watch: _Watch) -> None:
    def of_one(kind: str, name: str) -> None:
        function = getattr(os, name)

        def wrapped(path: Any, *arguments: Any, **named: Any) -> Any:
            place = watch.inside(path, named.get("dir_fd"))
            return watch.call(kind, place, lambda: function(path, *arguments, **named), new=kind == "mkdir")

        setattr(os, name, wrapped)

    def of_two(kind: str, name: str) -> None:
        function = getattr(os, name)

        def wrapped(source: Any, target: Any, **named: Any) -> Any:
            place = watch.inside(target, named.get("dst_dir_fd"))
            new = bool(watch.plan.late) and not os.path.lexists(target)
            return watch.call(kind, place, lambda: function(source, target, **named), new)

        setattr(os, name, wrapped)

    for kind, name in (("mkdir", "mkdir"), ("unlink", "unlink"), ("unlink", "remove"), ("rmdir", "rmdir")):
        of_one(kind, name)
    of_one("fsync", "fsync")
    for name in ("replace", "rename"):
        of_two("rename", name)
    low, high = os.open, io.open

    def open_low(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        place = watch.inside(path, named.get("dir_fd")) if writes else None
        result: int = watch.call("open", place, lambda: low(path, flags, *arguments, **named))
        return result

    def open_high(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        writes = not isinstance(file, int) and bool(set(mode) & set("wax+"))
        new = writes and bool(watch.plan.late) and not os.path.lexists(file)
        place = watch.inside(file) if writes else None
        return watch.call("open", place, lambda: high(file, mode, *arguments, **named), new)

    os.open, io.open, builtins.open = open_low, open_high, open_high  # type: ignore[assignment]


def _bend_clock(seconds: float) -> None:
    true_time, true_datetime = time.time, datetime.datetime

    class Bent(true_datetime):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return true_datetime.now(tz) + datetime.timedelta(seconds=seconds)

    time.time = lambda: true_time() + seconds
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "losslens" and getattr(module, "datetime", None) is true_datetime:
            module.datetime = Bent  # type: ignore[attr-defined]


def _enter_namespace(process: int) -> None:
    here = os.getcwd()
    with _open(f"/proc/{process}/ns/mnt", "rb") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), "setns")
    os.chdir(here)  # it is / in there


def _fill(folder: Path, what: str) -> None:
    """Takes all the room, or all the inodes, of a small file system: files `BALLAST*` in its topmost folder."""
    assert os.path.ismount(folder)
    with suppress(OSError):
        if what == "room":
            with _open(folder / BALLAST, "wb", buffering=0) as file:
                while True:  # a last page is written in part
                    file.write(bytes(1 << 20))
        for number in count():
            os.close(_low(folder / f"{BALLAST}-{number}", os.O_CREAT | os.O_WRONLY))


def _forbid_locks(name: str) -> None:
    def flock(*_: Any) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    fcntl.flock = flock


def _hide_new_names(watch: _Watch) -> None:
    def is_hidden(path: Any) -> bool:
        if isinstance(path, int):
            return False
        place = watch.inside(path)
        return place is not None and not watch.is_busy and watch.is_hidden(place)

    def sight(name: str) -> None:
        function = getattr(os, name)

        def wrapped(path: Any, *arguments: Any, **named: Any) -> Any:
            if named.get("dir_fd") is None and is_hidden(path):
                raise missing(path)
            return function(path, *arguments, **named)

        setattr(os, name, wrapped)

    for name in ("stat", "lstat", "access"):
        sight(name)
    listdir, scandir, read = os.listdir, os.scandir, io.open

    def listed(path: Any = ".") -> list[Any]:
        names = listdir(path)
        return names if isinstance(path, int) else [name for name in names if not is_hidden(os.path.join(path, name))]

    class Scanned:
        def __init__(self, path: Any) -> None:
            self.path, self.entries = path, scandir(path)

        def __iter__(self) -> Iterator[Any]:
            return (e for e in self.entries if isinstance(self.path, int) or not is_hidden(e.path))

        def __next__(self) -> Any:
            return next(iter(self))

        def __enter__(self) -> Scanned:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def close(self) -> None:
            self.entries.close()

    def open_read(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") and is_hidden(file):
            raise missing(file)
        return read(file, mode, *arguments, **named)

    os.listdir, os.scandir = listed, lambda path=".": Scanned(path)  # type: ignore[assignment]
    io.open = builtins.open = open_read  # type: ignore[assignment]
