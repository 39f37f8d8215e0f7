"""The sandboxed process that verifies answers: receives pickled requests from its parent and returns plain JSON.

Answers come from a model or from untrusted data, and some scorers evaluate them. Before the first answer arrives, the
process therefore gives up what an attacker could use: the environment, the network, all files except Python's own
packages, writing, and other processes. The layers, from the most portable to the strictest:

- an empty environment, and no inherited files;
- a Python audit hook (everywhere): no sockets, no processes, no writing, no reading outside Python's folders;
- resource limits (Linux, macOS): no writing to files, limited memory;
- Landlock (Linux 5.13 and later): the kernel permits reading only in those folders;
- a seccomp filter (Linux on x86-64 and 64-bit ARM): only the system calls needed for computing and reading.

A verifier with `needs_network` keeps the environment, the network and read access: it is the user's own code, which
calls a server. It still cannot write files or start processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pickle
import platform
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

# Kept from the parent's environment: where the loader finds shared libraries and Python. Read before it is cleared.
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "PYTHONHOME", "SYSTEMROOT")

_MEMORY = 8 << 30  # address space of the process, in bytes
# Slow imports, by the verifier's module; done before any time limit starts.
_IMPORTS = {"losslens.problems.reasoning_gym": "reasoning_gym", "losslens.problems.mathematics": "math_verify"}
# Unneeded imports, by the verifier's module: two of reasoning-gym's tasks use this library to generate problems, not to
# score answers, and it imports matplotlib, which takes longer than everything else.
_UNNEEDED_IMPORTS = {"losslens.problems.reasoning_gym": "cellpylib"}
# Paths outside Python's folders that numerical libraries read; none contains secrets.
_SYSTEM = (
    "/dev/null", "/dev/urandom", "/dev/random", "/etc/ld.so.cache", "/etc/localtime", "/lib", "/lib64",
    "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo",
)  # fmt: skip
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_NO_NEW_PRIVS, _PR_SET_VMA = 1, 15, 16, 38, 0x53564D41


@dataclass(frozen=True)
class Start:
    """The first message to the process.

    Attributes:
        main: Location of the parent's `__main__`, as described by multiprocessing's `spawn`, or empty.
        module: Module of the verifier, imported while files can still be read.
        needs_network: Allows the verifier to use the network, the environment and files (read-only).
        parent: Process id of the parent.
    """

    main: dict[str, Any]
    module: str
    needs_network: bool
    parent: int


def serve() -> None:
    """Verifies answers from stdin and writes verdicts to stdout until stdin ends; runs in its own process."""
    requests, answers = _channel()
    start: Start = pickle.loads(received(requests) or b"")
    if not start.needs_network:
        os.environ.clear()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None:
        # If the parent is killed, the kernel kills this process, too.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != start.parent:
            return
    try:
        spawn.prepare(start.main)
        if name := _UNNEEDED_IMPORTS.get(start.module):
            sys.modules[name] = ModuleType(name)
        for name in (start.module, _IMPORTS.get(start.module, "json")):
            if name != "__main__":
                importlib.import_module(name)
    except Exception as error:  # reported by the parent
        _send(answers, {"failed": f"{type(error).__name__}: {error}"})
        return
    _lock_down(libc, start)
    _send(answers, {"ready": True})
    while (request := received(requests)) is not None:
        _send(answers, _verify(request))


def _verify(request: bytes) -> dict[str, Any]:
    from losslens.core.errors import InputError, first_line

    try:
        number, verifier, problem, completion = pickle.loads(request)
    except Exception as error:
        return {"input_error": f"the verifier cannot be loaded: {type(error).__name__}: {first_line(error)}"}
    try:
        verdict = verifier(problem, completion)
        result = {"answer": verdict.answer, "correct": bool(verdict.correct), "trouble": str(verdict.trouble)}
    except MemoryError:
        result = {"trouble": "verification ran out of memory or crashed"}
    except InputError as error:  # invalid settings, not an invalid answer
        result = {"input_error": str(error)}
    except Exception as error:  # an answer of a form that the scorer does not support
        result = {"trouble": f"verification failed: {type(error).__name__}: {first_line(error)}"}
    return {"number": number, **result}


def _channel() -> tuple[BinaryIO, BinaryIO]:
    """Returns duplicates of stdin and stdout, and redirects the originals so that a verifier cannot use them."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    return requests, answers


def received(requests: BinaryIO) -> bytes | None:
    """Reads the next length-prefixed message; None at the end."""
    head = requests.read(8)
    return requests.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else None


def message(content: Any) -> bytes:
    """Pickles a message with a length prefix, for `received`. Used only from the parent to the process."""
    body = pickle.dumps(content)
    return struct.pack("<Q", len(body)) + body


def _send(answers: BinaryIO, content: dict[str, Any]) -> None:
    answers.write(json.dumps(content, default=str).encode() + b"\n")
    answers.flush()


def _lock_down(libc: Any, start: Start) -> None:
    """Drops all rights that verification does not need, with the layers that the platform supports."""
    sys.dont_write_bytecode = True
    filtered = False
    folders = _readable(start.module)
    if libc is not None and libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        if not start.needs_network:
            _landlock(libc, folders)
        filtered = _seccomp(libc, start.needs_network)
    _limit(processes=filtered or start.needs_network)
    sys.addaudithook(_Guard(folders, start.needs_network))


def _readable(module: str) -> list[str]:
    """Returns the readable files and folders: Python's, this package's, and those of the verifier's own package."""
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    packages = {entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    own = {str(Path(__file__).parents[1])}
    own |= {str(path) for path in getattr(sys.modules.get(module.partition(".")[0]), "__path__", ())}
    readable = {os.path.realpath(path) for path in (*prefixes, *packages, *own, *_SYSTEM) if path}
    try:
        home = os.path.realpath(Path("~").expanduser())
    except RuntimeError:  # an unknown user, as in a container: no home folder to protect
        home = None
    return sorted(path for path in readable if Path(path).exists() and not (home and _is_below(home, [path])))


def _is_below(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip(os.sep) + os.sep) for folder in folders)


def _limit(processes: bool) -> None:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    limits = {resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = _MEMORY
    if not processes:
        limits[resource.RLIMIT_NPROC] = 0
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


class _Guard:
    """Audit hook that refuses Python operations which verification does not need.

    Args:
        folders: Readable files and folders.
        network: Allows the network and reading of all files.
    """

    _NEVER = (
        "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
        "os.killpg", "subprocess.Popen", "pty.spawn", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link",
        "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.chflags", "os.lockf", "os.setxattr", "os.removexattr",
        "os.utime", "winreg.SetValue", "winreg.CreateKey", "winreg.DeleteKey", "resource.setrlimit",
        "resource.prlimit",
    )  # fmt: skip
    _WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def __init__(self, folders: Sequence[str], network: bool) -> None:
        self._folders = tuple(folders)
        self._network = network

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            self._require(event, path, not (isinstance(flags, int) and flags & self._WRITES))
        elif event in ("os.listdir", "os.scandir"):
            self._require(event, arguments[0], allowed=True)
        elif event in self._NEVER or (not self._network and event.startswith(("socket.", "ctypes.", "winreg."))):
            raise PermissionError(f"not allowed in the verification process: {event}")

    def _require(self, event: str, path: Any, allowed: bool) -> None:
        if isinstance(path, int):  # already open
            return
        name = os.fsdecode(path) if isinstance(path, (str, bytes)) or hasattr(path, "__fspath__") else "."
        if not (allowed and (self._network or _is_below(os.path.realpath(name), self._folders))):
            raise PermissionError(f"not allowed in the verification process: {event} of {name}")


# Landlock: include/uapi/linux/landlock.h. Its system calls have the same numbers on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}  # number of file rights, by version
_NET_RIGHTS, _SCOPES = 0b11, 0b11  # binding and connecting TCP (version 4); abstract sockets and signals (version 6)


def _landlock(libc: Any, folders: Iterable[str]) -> None:
    """Restricts this process to reading files in `folders`, enforced by the kernel."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    files = (1 << max(count for since, count in _RIGHTS.items() if since <= version)) - 1
    net, scopes = (_NET_RIGHTS if version >= 4 else 0), (_SCOPES if version >= 6 else 0)
    rules = struct.pack("<QQQ", files, net, scopes)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0:
        return
    for folder in folders:
        handle = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rights = _READ_FILE | (_READ_DIR if Path(folder).is_dir() else 0)
        libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("<Qi", rights, handle), 0)
        os.close(handle)
    libc.syscall(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


# Numbers of system calls on x86-64 and 64-bit ARM (-1: does not exist).
_CALLS = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1),
    "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, -1), "pipe": (22, -1), "select": (23, -1),
    "sched_yield": (24, 124), "mremap": (25, 216), "mincore": (27, 232), "madvise": (28, 233), "dup": (32, 23),
    "dup2": (33, -1), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1), "setitimer": (38, 103),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25), "getcwd": (79, 17),
    "readlink": (89, -1), "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165),
    "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175),
    "getegid": (108, 177), "getppid": (110, 173), "getresuid": (118, 148), "getresgid": (120, 150),
    "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "arch_prctl": (158, -1), "gettid": (186, 178), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, -1), "epoll_ctl": (233, 21),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "get_robust_list": (274, 100), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "getcpu": (309, 168),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439), "futex_waitv": (449, 449),
}  # fmt: skip
_NETWORK_CALLS = {
    "socket": (41, 198), "connect": (42, 203), "sendto": (44, 206), "recvfrom": (45, 207), "sendmsg": (46, 211),
    "recvmsg": (47, 212), "shutdown": (48, 210), "bind": (49, 200), "getsockname": (51, 204),
    "getpeername": (52, 205), "socketpair": (53, 199), "setsockopt": (54, 208), "getsockopt": (55, 209),
    "recvmmsg": (299, 243), "sendmmsg": (307, 269),
}  # fmt: skip
# glibc has fallbacks for these if they do not exist, so they are refused with ENOSYS instead of EPERM.
_ABSENT_CALLS = {"clone3": (435, 435), "openat2": (437, 437)}
_IOCTLS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # terminal queries, number of readable bytes, close-on-exec
_O_WRITES = 0o3 | 0o100 | 0o1000 | 0o2000  # O_ACCMODE, O_CREAT, O_TRUNC, O_APPEND: the same on both
_CLONE_THREAD = 0x10000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # of classic BPF
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E, 317), "aarch64": (1, 0xC00000B7, 277)}  # column, AUDIT_ARCH, __NR_seccomp

Instruction = tuple[int, int, int, int]


def _seccomp(libc: Any, network: bool) -> bool:
    """Restricts all threads to the system calls in the tables; returns True if the kernel enforces it."""
    if platform.machine() not in _ARCHITECTURES or sys.byteorder != "little":
        return False
    column, architecture, seccomp = _ARCHITECTURES[platform.machine()]
    code = _filter(column, architecture, network)
    content = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *instruction) for instruction in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(content))
    return bool(libc.syscall(seccomp, 1, 1, program) == 0)  # SECCOMP_SET_MODE_FILTER with SECCOMP_FILTER_FLAG_TSYNC


def _filter(column: int, architecture: int, network: bool) -> list[Instruction]:
    me = os.getpid()
    readonly, nothing = [("none", _O_WRITES)], [("is", 0)]
    # System calls that are allowed under conditions: offset of an argument, allowed values.
    conditional: list[tuple[tuple[int, int], dict[int, Any]]] = [
        ((2, -1), {16 + 8 * 1: readonly}),  # open
        ((257, 56), {16 + 8 * 2: readonly}),  # openat
        ((56, 220), {16: [("some", _CLONE_THREAD)]}),  # clone: threads only
        ((62, 129), {16: [("is", me)]}),  # kill
        ((234, 131), {16: [("is", me)]}),  # tgkill
        ((302, 261), {16 + 8 * 2: nothing, 20 + 8 * 2: nothing}),  # prlimit64: query only
        ((16, 29), {16 + 8 * 1: [("is", number) for number in _IOCTLS]}),  # ioctl
        ((157, 167), {16: [("is", number) for number in (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA)]}),  # prctl
    ]
    code: list[Instruction] = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    code.append((_LOAD, 0, 0, 0))
    for numbers in {**_CALLS, **(_NETWORK_CALLS if network else {})}.values():
        if numbers[column] >= 0:
            code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ALLOW)]
    for numbers in _ABSENT_CALLS.values():
        code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS)]
    for numbers, conditions in conditional:
        if numbers[column] >= 0:
            body = [instruction for offset, choices in conditions.items() for instruction in _one_of(offset, choices)]
            body.append((_RETURN, 0, 0, _ALLOW))
            code += [(_EQUAL, 0, len(body), numbers[column]), *body]
    return [*code, (_RETURN, 0, 0, _ERRNO | _EPERM)]


def _one_of(offset: int, choices: Sequence[tuple[str, int]]) -> list[Instruction]:
    """Continues if the 32 bits at `offset` match one of `choices`, and refuses the call otherwise."""
    code: list[Instruction] = [(_LOAD, 0, 0, offset)]
    for index, (kind, value) in enumerate(choices):
        rest = len(choices) - index - 1
        # The other choices follow, then the refusal.
        code.append((_EQUAL, rest + 1, 0, value) if kind == "is" else (_ANY_BIT, rest + 1, 0, value))
        if kind == "none":
            code[-1] = (_ANY_BIT, rest, rest + 1, value)
    return [*code, (_RETURN, 0, 0, _ERRNO | _EPERM)]
