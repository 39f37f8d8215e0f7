"""Runs a command until it ends or the process that started this one does: `python supervised.py COMMAND…`.

The starting process keeps a pipe to this one's standard input open. The kernel closes it when that process ends in
whatever way, SIGKILL included; the command and all processes of its session are then terminated. Imports nothing of
the package, since it runs in an isolated interpreter.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


def main() -> int:
    """Returns the command's exit status."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    command = subprocess.Popen(
        sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_this_process
    )
    while command.poll() is None and not told:
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], 0.5)
        if readable and not os.read(sys.stdin.fileno(), 1):
            break
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(command.pid, number)
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and _is_alive(command):
            time.sleep(0.1)
    return command.wait()


def _end_with_this_process() -> None:
    """Lets the kernel send SIGTERM to the command if this process is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _is_alive(command: subprocess.Popen[bytes]) -> bool:
    """Returns True while any process of the command's group exists."""
    command.poll()  # otherwise it would stay as a zombie
    try:
        os.killpg(command.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
