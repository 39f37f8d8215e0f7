"""Verification of answers in a separate process, so that a hostile answer costs no more than its time limit.

Time limits by signals or threads are not reliable: `9**9**9` keeps the interpreter inside one C call. Here, a process
that does not respond in time is killed and replaced. `sandbox.py` defines what it may do; its responses are JSON, never
unpickled, and validated.
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

_DIED = "verification ran out of memory or crashed"
_MAX_RESPONSE = 1 << 22  # bytes per answer
_COMMAND = "import sys; sys.path[:] = {path!r}; from losslens.problems.sandbox import serve; serve()"


def verdicts(
    verifier: Verifier, problems: Sequence[Problem], completions: Sequence[str], seconds: float
) -> list[Verdict]:
    """Verifies completions; those that cannot be verified count as incorrect and have `trouble` set.

    Args:
        verifier: Verifies one completion. Only with `needs_network = True` it has access to the network, the
            environment and files.
        problems: The problem of each completion.
        completions: The completions, as many as problems.
        seconds: Time limit per completion.

    Raises:
        InputError: The verifier cannot be pickled or loaded in the process, or its settings are invalid.
    """
    try:
        pickle.dumps(verifier)
    except Exception as error:
        raise InputError(
            f"the verifier {type(verifier).__name__} cannot be sent to the verification process: {first_line(error)}"
        ) from error
    checker = _checker(os.getpid(), module_of(verifier), bool(getattr(verifier, "needs_network", False)))
    results = [
        checker.verdict(verifier, problem, completion, seconds)
        for problem, completion in zip(problems, completions, strict=True)
    ]
    troubles = [verdict.trouble for verdict in results if verdict.trouble]
    if troubles:
        count = f"{len(troubles)} of {len(results)}"
        print(f"{count} answers could not be verified and count as incorrect; first: {troubles[0]}", flush=True)
    return results


class _Checker:
    """The process that verifies answers with the verifiers of one module; started on first use.

    Args:
        module: Module of the verifiers.
        needs_network: Allows them to use the network.
    """

    def __init__(self, module: str, needs_network: bool) -> None:
        self.module = module
        self.needs_network = needs_network
        self._requests = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        # Not `atexit`, which does not run in processes started by multiprocessing.
        Finalize(self, self.stop, exitpriority=100)

    def verdict(self, verifier: Verifier, problem: Problem, completion: str, seconds: float) -> Verdict:
        """Verifies one completion within `seconds`."""
        with self._lock:
            try:
                process = self._start(verifier)
                late = threading.Event()
                limit = threading.Timer(seconds, _kill, (process, late))
                limit.daemon = True
                limit.start()
                try:
                    self._requests += 1
                    response = _answer(process, (self._requests, verifier, problem, completion))
                finally:
                    limit.cancel()
            except BaseException:  # after a Ctrl-C, the next request must not receive this response
                self.stop()
                raise
            if response is not None and "input_error" in response:
                raise InputError(str(response["input_error"]))
            if response is None or response.get("number") != self._requests:  # crashed or compromised
                self.stop()
                return Verdict(None, False, f"not verified within {seconds:g} s" if late.is_set() else _DIED)
        answer, trouble = response.get("answer"), response.get("trouble")
        return Verdict(
            _text(answer) if isinstance(answer, str) else None,
            response.get("correct") is True,
            _text(trouble) if isinstance(trouble, str) else "",
        )

    def stop(self) -> None:
        """Kills the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self, verifier: Verifier) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.stop()
        environment = dict(os.environ)
        if not self.needs_network:
            environment = {name: os.environ[name] for name in sandbox.KEPT if name in os.environ}
            # Some layers of the sandbox would not apply to threads started before it.
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # detached from the terminal
        )
        start = sandbox.Start(_main_of(verifier), self.module, self.needs_network, os.getpid())
        response = _answer(self._process, start)
        if response is None or "failed" in response:
            why = "the process crashed while loading it" if response is None else str(response["failed"])
            raise InputError(f"the verifier {self.module}.{type(verifier).__name__} cannot be loaded: {why}")
        return self._process


@lru_cache(maxsize=8)
def _checker(_: int, module: str, needs_network: bool) -> _Checker:
    """Returns the checker of this process (by process id, so that a fork does not use its parent's)."""
    return _Checker(module, needs_network)


def _kill(process: subprocess.Popen[bytes], late: threading.Event) -> None:
    """Kills the process at the time limit, which also ends the wait for its response."""
    late.set()
    process.kill()


def _main_of(verifier: Verifier) -> dict[str, Any]:
    """Returns multiprocessing's preparation data; includes `__main__` only if the verifier is defined there."""
    data = spawn.get_preparation_data("verifier")
    data.pop("authkey", None)  # for multiprocessing's own connections
    if b"__main__" not in pickle.dumps(verifier):
        data.pop("init_main_from_name", None)
        data.pop("init_main_from_path", None)
    return data


def _answer(process: subprocess.Popen[bytes], content: Any) -> dict[str, Any] | None:
    """Sends `content` to the process and returns its response; None if it has ended or the response is invalid."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(sandbox.message(content))
        process.stdin.flush()
    except OSError:
        return None
    line = process.stdout.readline(_MAX_RESPONSE)
    try:
        response = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return response if isinstance(response, dict) else None


def _text(value: str) -> str:
    # Lone surrogates cannot be stored.
    return value.encode("utf-8", "replace").decode("utf-8")
