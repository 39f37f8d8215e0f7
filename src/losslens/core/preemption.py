"""Preemption: a scheduler's signal stops the work at a point where little is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_received: signal.Signals | None = None
_deferred = False


class Preempted(BaseException):
    """The work has stopped at the scheduler's request; its results so far are on disk.

    Not an `Exception`, so that no handler mistakes it for a failure.
    """

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(f"stopped by {signum.name}")
        self.signal = signum


def install_handlers(*signals: signal.Signals) -> None:
    """Makes the first of these signals raise `Preempted`, at once or at the end of a `deferred` block."""
    for signum in signals:
        signal.signal(signum, _handle)


def ignore(*signals: signal.Signals) -> None:
    """Ignores these signals, once the work is done and they must not change the exit status."""
    for signum in signals:
        signal.signal(signum, signal.SIG_IGN)


def is_requested() -> bool:
    """True if the work has been asked to stop."""
    return _received is not None


def request(signum: signal.Signals) -> None:
    """Requests a stop as a signal would: another process of the same run received one."""
    global _received
    _received = _received or signum


@contextmanager
def deferred() -> Iterator[None]:
    """Defers signals: inside the block they only set `is_requested`; `Preempted` is raised when the block ends."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False
    if _received is not None:
        raise Preempted(_received)


def _handle(signum: int, _: FrameType | None) -> None:
    if _received is not None:
        return  # already stopping
    request(signal.Signals(signum))
    if not _deferred:
        raise Preempted(signal.Signals(signum))
