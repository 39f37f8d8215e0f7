"""Locks between processes, on a file beside what they protect."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from losslens.core.errors import InputError

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def file_lock(file: Path) -> FileLock:
    """Returns a lock on a file, which may exist; the lock ends with its process."""
    # In place of flock a file that exists while the lock is held would outlive a killed process.
    return _Lock(file, fallback_to_soft=False)


@contextmanager
def held(lock: BaseFileLock, waiting: Callable[[], str]) -> Iterator[None]:
    """Holds a lock within the block; prints the line `waiting()` if another process holds it, and waits.

    Raises:
        OSError: The lock's folder does not exist or cannot be written to.
        InputError: The file system has no locks.
    """
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(waiting(), flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Lock(FileLock):
    """A file lock that says in one line when the file system has none."""

    def acquire(self, *arguments: Any, **options: Any) -> Any:
        """Acquires the lock, like filelock's.

        Raises:
            InputError: The file system has no locks.
            Timeout: Another process holds the lock, and it is not waited for any longer.
        """
        try:
            return super().acquire(*arguments, **options)
        except OSError as error:  # Timeout, too, which has no number
            if error.errno not in _WITHOUT_LOCKS:
                raise
            raise InputError(
                f"{self.lock_file}: cannot be locked ({error.strerror}); the output folder must be on a file system "
                "with file locks"
            ) from error
