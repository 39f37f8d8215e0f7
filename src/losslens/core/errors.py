"""The exceptions that are told in one line."""


class InputError(Exception):
    """Bad input: a configuration value, a file or a folder that cannot be used.

    Its text is one line that names the field or the file. The entry scripts print it without a traceback and end
    with exit status 2.
    """


class UnavailableError(InputError):
    """Something is not there that only a part of the work needs: the rest can go on without, and must say so."""


class ServerError(Exception):
    """A server did not answer. Not bad input: the same command may work later, and goes on where it stopped.

    Its text is one line. The entry scripts print it without a traceback and end with exit status 1.
    """


class ProcessError(Exception):
    """Of several processes that train a run together another one failed. Its text is one line: which, and how."""


class DivergedError(FloatingPointError):
    """A run's loss, gradient or weights are no longer numbers. Its text is one line that says what, and when."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
