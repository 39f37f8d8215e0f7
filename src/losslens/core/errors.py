"""Exceptions that are reported in one line."""

from __future__ import annotations

import errno
import re

# Of writing; whatever the reason of the call, the user must make room or choose another place.
_STORAGE = {
    errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "the disk quota is exceeded",
    errno.EROFS: "the file system is read-only", errno.EFBIG: "larger than a file may be here (ulimit -f)",
}  # fmt: skip
# Of reading or writing a path that is not what it should be.
_PLACES = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# How libraries that are not Python report the former; torch says nothing of the reason.
_STORAGE_TEXTS = {
    errno.ENOSPC: r"No space left on device|os error 28\b|PytorchStreamWriter|unexpected pos \d+ vs",
    errno.EDQUOT: r"Disk quota exceeded|os error 122\b",
    errno.EROFS: r"Read-only file system|os error 30\b",
    errno.EFBIG: r"File too large|os error 27\b",
}


class InputError(Exception):
    """Invalid input: a configuration value, a file or a folder that cannot be used.

    Its message is one line that names the field or the file. The entry scripts print it without a traceback and exit
    with status 2.
    """


class UnavailableError(InputError):
    """Something that only part of the work needs is missing: the rest may continue, and must report what it skips."""


class ServerError(Exception):
    """A server did not answer. The input is valid: the same command may succeed later, and resumes where it stopped.

    Its message is one line. The entry scripts print it without a traceback and exit with status 1.
    """


class ServerStartError(ServerError):
    """A server that the command itself starts did not start, so that it cannot be asked for anything."""


class WorkerDiedError(ServerError):
    """A process that did part of the work was killed. As after `ServerError`, the same command may succeed later."""


class ProcessError(Exception):
    """Another of the processes that train a run together failed. Its message is one line with its rank and error."""


class DivergedError(FloatingPointError):
    """A run's loss, gradient or weights are not finite. Its message is one line that says which, and at which step."""


def as_result(error: InputError | ServerError) -> InputError | ServerError:
    """Returns an error of the same kind with the message alone, which a worker process can send to its parent."""
    for kind in (ServerStartError, ServerError, UnavailableError):
        if isinstance(error, kind):
            return kind(str(error))
    return InputError(str(error))


def describe_storage_error(error: BaseException, place: object) -> str:
    """Describes in one line that the disk is full or cannot be written to; empty if that is not what happened.

    Args:
        error: Any error; those that led to it are considered, too.
        place: Folder that was written to, for errors that name no file.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number not in _STORAGE:
            number = next((n for n, texts in _STORAGE_TEXTS.items() if re.search(texts, str(seen))), None)
        if number is not None:
            file = getattr(seen, "filename", None) or place
            return f"{file}: {_STORAGE[number]}; make room or choose another place, then run the same command again"
        seen = seen.__cause__ or seen.__context__
    return ""


def describe_place_error(error: BaseException) -> str:
    """Describes in one line that a path cannot be read or written as a file or folder; empty for other errors."""
    if isinstance(error, OSError) and error.errno in _PLACES and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
