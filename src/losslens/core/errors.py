"""Exceptions that are reported in one line."""


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


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
