"""Stopping in time: a scheduler's signal ends the work where little is lost, and the caller learns of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked: signal.Signals | None = None
_deferred = False


class Preempted(BaseException):
    """The scheduler asked for the work to stop, and it has: what was done is on disk.

    Not an `Exception`: nothing on the way is to take it for a failure of its own.
    """

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}")
        self.signal = signum


def install_handlers(*signals: signal.Signals) -> None:
    """From now on the first of these signals raises `Preempted`, at once or where a `deferred` block ends."""
    for signum in signals:
        signal.signal(signum, _handle)


def ignore(*signals: signal.Signals) -> None:
    """From now on these signals do nothing: all that is left is to exit, with the status that the work earned."""
    for signum in signals:
        signal.signal(signum, signal.SIG_IGN)


def is_requested() -> bool:
    """Whether the work is to stop."""
    return _asked is not None


def request(signum: signal.Signals) -> None:
    """Notes that the work is to stop, as a signal would: another process of the same run got one."""
    global _asked
    _asked = _asked or signum


@contextmanager
def deferred() -> Iterator[None]:
    """Defers signals: inside they are only noted (`is_requested`); `Preempted` is raised when the block ends."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _asked is not None:
        raise Preempted(_asked)


def _handle(signum: int, _: FrameType | None) -> None:
    if _asked is not None:
        return  # it is stopping already
    request(signal.Signals(signum))
    if not _deferred:
        raise Preempted(signal.Signals(signum))
