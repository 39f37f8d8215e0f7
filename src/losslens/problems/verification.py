"""Checks answers in a process of its own, so that a hostile one costs its time limit and nothing else.

A time limit by signal or thread does not hold: `9**9**9` keeps the interpreter inside one C call. Here the process that
does not answer in time is killed, and another takes its place. What it may do, and what not, stands in `sandbox.py`;
what it answers is JSON, never unpickled, and checked.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from multiprocessing import spawn
from multiprocessing.util import Finalize
from typing import Any

from losslens.core.errors import InputError, first_line
from losslens.problems import Problem, Verdict, Verifier, module_of, sandbox

_DIED = "its check ran out of memory or died"
_LONGEST = 1 << 22  # bytes of what the process may say of one answer
_COMMAND = "import sys; sys.path[:] = {path!r}; from losslens.problems.sandbox import serve; serve()"


def verdicts(
    verifier: Verifier, problems: Sequence[Problem], completions: Sequence[str], seconds: float
) -> list[Verdict]:
    """The verdict on each completion; what cannot be checked counts as wrong, with the trouble it made.

    Args:
        verifier: Checks one completion. `needs_network = True` on it leaves it the network, the environment and what
            it reads; without, it has none of them.
        problems: The problem that each completion answers.
        completions: As many.
        seconds: Time limit of each.

    Raises:
        InputError: The verifier cannot be sent or loaded there, or its settings are wrong.
    """
    try:
        pickle.dumps(verifier)
    except Exception as error:
        raise InputError(
            f"the verifier {type(verifier).__name__} cannot be sent to the process that checks answers: "
            f"{first_line(error)}"
        ) from error
    checker = _checker(os.getpid(), module_of(verifier), bool(getattr(verifier, "needs_network", False)))
    found = [
        checker.verdict(verifier, problem, completion, seconds)
        for problem, completion in zip(problems, completions, strict=True)
    ]
    troubles = [verdict.trouble for verdict in found if verdict.trouble]
    if troubles:
        print(f"{len(troubles)} of {len(found)} answers count as wrong unchecked; the first: {troubles[0]}", flush=True)
    return found


class _Checker:
    """The process that checks answers with the verifiers of one module; begun when it is first needed.

    Args:
        module: The verifiers' module.
        needs_network: Whether they may use the network.
    """

    def __init__(self, module: str, needs_network: bool) -> None:
        self.module = module
        self.needs_network = needs_network
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._one_at_a_time = threading.Lock()
        # Not `atexit`, which does not run in a process that multiprocessing started.
        Finalize(self, self.stop, exitpriority=100)

    def verdict(self, verifier: Verifier, problem: Problem, completion: str, seconds: float) -> Verdict:
        """The verdict on one completion, within `seconds`."""
        with self._one_at_a_time:
            try:
                process = self._started(verifier)
                late = threading.Event()
                limit = threading.Timer(seconds, _end, (process, late))
                limit.daemon = True
                limit.start()
                try:
                    self._asked += 1
                    said = _answer(process, (self._asked, verifier, problem, completion))
                finally:
                    limit.cancel()
            except BaseException:  # a Ctrl-C in the middle: the next answer must not be this one's
                self.stop()
                raise
            if said is not None and "input_error" in said:
                raise InputError(str(said["input_error"]))
            if said is None or said.get("number") != self._asked:  # it is no more, or not to be trusted any more
                self.stop()
                return Verdict(None, False, f"not checked within {seconds:g} s" if late.is_set() else _DIED)
        answer, trouble = said.get("answer"), said.get("trouble")
        return Verdict(
            _text(answer) if isinstance(answer, str) else None,
            said.get("correct") is True,
            _text(trouble) if isinstance(trouble, str) else "",
        )

    def stop(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _started(self, verifier: Verifier) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        environment = dict(os.environ)
        if not self.needs_network:
            environment = {name: os.environ[name] for name in sandbox.KEPT if name in os.environ}
            # A thread that was there before would be outside some of the walls.
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # no terminal to type into
        )
        start = sandbox.Start(_main_of(verifier), self.module, self.needs_network, os.getpid())
        said = _answer(self._process, start)
        if said is None or "failed" in said:
            why = "it died while it was loaded" if said is None else str(said["failed"])
            raise InputError(f"the verifier {self.module}.{type(verifier).__name__} cannot be loaded: {why}")
        return self._process


@lru_cache(maxsize=8)
def _checker(_: int, module: str, needs_network: bool) -> _Checker:
    """The checker of this process (by its id: what a fork inherits is another's)."""
    return _Checker(module, needs_network)


def _end(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    """What happens at the time limit: with the process ends what is waited for."""
    late.set()
    process.kill()


def _main_of(verifier: Verifier) -> dict[str, Any]:
    """What the process needs to find what is defined in `__main__`, when the verifier is; else its folder alone."""
    about = spawn.get_preparation_data("verifier")
    about.pop("authkey", None)  # of multiprocessing's own connections
    if b"__main__" not in pickle.dumps(verifier):
        about.pop("init_main_from_name", None)
        about.pop("init_main_from_path", None)
    return about


def _answer(process: subprocess.Popen[bytes], content: Any) -> dict[str, Any] | None:
    """What the process says to `content`; None when it is no more, or says what it never should."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(sandbox.message(content))
        process.stdin.flush()
    except OSError:
        return None
    line = process.stdout.readline(_LONGEST)
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _text(value: str) -> str:
    # Half of a surrogate pair is no text, and nothing could keep it.
    return value.encode("utf-8", "replace").decode("utf-8")
