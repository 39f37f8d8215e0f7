"""A disk without room: what was there stays, the run is marked, the line says why, and with room again it is done."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from losslens.analysis.cache import Cache
from losslens.core import files
from losslens.core.completions import Completion, Journal
from losslens.core.errors import describe_storage_error
from losslens.core.files import atomic_folder, read_json, write_json
from losslens.core.jobs import Jobs
from losslens.rollouts.frozen import freeze, load_rollouts
from losslens.runs.run import Run
from losslens.training.reference import _read, _write
from tests.faults.campaign import judge, run, targets, undisturbed
from tests.faults.conftest import dice, per_kind
from tests.faults.ledger import record
from tests.faults.prepared import Prepared
from tests.faults.shim import BALLAST, Plan

# What the disk says, by operation of ours: `temporary.write_bytes`, `fsync`, `rename`, …
ERRORS = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "read-only": errno.EROFS, "too large": errno.EFBIG}


@contextmanager
def failing(number: int, at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The disk fails at the `at`-th sync or rename, and at all later ones."""
    count = 0

    def fails(call: Callable[..., Any]) -> Callable[..., Any]:
        def tried(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > at:
                raise OSError(number, os.strerror(number))
            return call(*arguments, **options)

        return tried

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fails(os.fsync))
        patched.setattr(Path, "replace", fails(Path.replace))
        yield


def _json(folder: Path, number: int) -> None:
    write_json(folder / "x.json", {"number": number}, sealed=True)


def _folder(folder: Path, number: int) -> None:
    with atomic_folder(folder / "made") as temporary:
        (temporary / "file").write_text(str(number))


def _cache(folder: Path, number: int) -> None:
    Cache(folder).save("kind", "key", {"x": np.array(number)})


def _logps(folder: Path, number: int) -> None:
    _write(folder / "logps.safetensors", [np.full(3, number, dtype=np.float32)])


def _number(folder: Path) -> list[int]:
    """What of the number has been written, by each kind of file."""
    found = []
    if (folder / "x.json").exists():
        found.append(read_json(folder / "x.json")["number"])
    if (folder / "made").exists():
        found.append(int((folder / "made" / "file").read_text()))
    if (arrays := Cache(folder).load("kind", "key", ["x"])) is not None:
        found.append(int(arrays["x"]))
    if (folder / "logps.safetensors").exists():
        found.append(int(_read(folder / "logps.safetensors", np.array([3]))[0][0]))
    return found


@pytest.mark.parametrize("write", [_json, _folder, _cache, _logps])
@pytest.mark.parametrize("what", ERRORS)
def test_a_file_is_written_whole_or_not_at_all(
    write: Callable[[Path, int], None], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    for at in range(2):
        with failing(ERRORS[what], at, monkeypatch), pytest.raises(OSError, match="Errno") as error:
            write(tmp_path, 2)
        line = describe_storage_error(error.value, tmp_path)
        whole = _number(tmp_path) == [1] and not list(tmp_path.rglob("*.tmp"))
        record(f"disk: {what}", f"{write.__name__} {at}", "clear line" if line and whole else "left over", line)
    write(tmp_path, 2)
    assert _number(tmp_path) == [2]


def test_frozen_rollouts_on_a_full_disk(rollouts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(4):
        with failing(errno.ENOSPC, at, monkeypatch), pytest.raises(OSError, match="Errno"):
            freeze(rollouts, tmp_path, "x", {"keys": []})
        record("disk: full", f"freeze {at}", "clear line" if not list(tmp_path.iterdir()) else "left over")
    load_rollouts(freeze(rollouts, tmp_path, "x", {"keys": []}))


TMPFS = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000):  # CLONE_NEWNS
    sys.exit(77)
place = sys.argv[1].encode()
libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # what is mounted stays in here
if libc.mount(b"none", place, b"tmpfs", 0, sys.argv[2].encode()):
    sys.exit(77)
from pathlib import Path
from losslens.core.errors import describe_storage_error
from losslens.runs.run import Run
run = Run(Path(sys.argv[1]) / "sft-1")
run.set_state("running", step=3, max_steps=9)
kept = 0
try:
    while True:
        (run.folder / f"fill-{kept}").write_bytes(bytes(1000))
        kept += 1
except OSError as error:
    line = describe_storage_error(error, run.folder)
    run.set_state("failed", error=line)
assert run.status["state"] == "failed", run.status
assert run.status["error"] == line and "no space left on the disk" in line
assert not list(run.folder.glob(".*.tmp"))
for file in run.folder.glob("fill-*"):
    file.unlink()
run.set_state("completed")
assert run.status["state"] == "completed"
"""


@pytest.mark.parametrize("options", ["size=16k", "size=64k", "size=1m,nr_inodes=9", "size=4m,nr_inodes=30"])
def test_a_run_on_a_full_disk_is_not_left_running(options: str, tmp_path: Path) -> None:
    """A real file system without room, in a mount namespace of its own."""
    outcome = subprocess.run(
        [sys.executable, "-c", TMPFS, str(tmp_path), options], capture_output=True, text=True, check=False
    )
    if outcome.returncode == 77:
        pytest.skip("no file system can be mounted here")
    record(f"tmpfs {options}", "set_state", "clear line" if not outcome.returncode else "traceback", outcome.stderr)


KEEPER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x00020000):  # CLONE_NEWNS
    sys.exit(77)
libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # what is mounted stays in here
if libc.mount(b"none", sys.argv[1].encode(), b"tmpfs", 0, b"size=64m,nr_inodes=4000"):
    sys.exit(77)
print("mounted", flush=True)
sys.stdin.read()
"""


@contextmanager
def small_disk(output: Path) -> Iterator[tuple[int, Path]]:
    """Mounts a file system of 64 MB on a folder, in a mount namespace: its process, and the folder seen from here."""
    output.mkdir()
    keeper = subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        if not keeper.stdout.readline():
            pytest.skip("no file system can be mounted here")
        try:
            yield keeper.pid, Path(f"/proc/{keeper.pid}/root{output}")
        finally:
            keeper.stdin.close()


FILLED = [(name, what) for name in ("train", "rollout", "analyze", "evaluate") for what in ("room", "inodes")]


@pytest.mark.parametrize(("name", "what"), FILLED if per_kind(0) else [("train", "room"), ("rollout", "inodes")])
def test_a_command_on_a_disk_that_fills_up(name: str, what: str, prepared: Prepared, tmp_path: Path) -> None:
    """A real file system fills up at one of the command's writes; with room again, the same command is done."""
    command = getattr(prepared, name)
    known = undisturbed(command, tmp_path)
    places = targets(known.operations)
    for number, place in enumerate(dice(f"fill {what} {name}").sample(places, min(per_kind(1), 8, len(places)))):
        output = tmp_path / f"outputs-{number}"
        at = (place.kind, place.path, place.number)
        with small_disk(output) as (keeper, view):
            if command.before is not None:
                shutil.copytree(command.before, view, symlinks=True, dirs_exist_ok=True)
            log = str(tmp_path / f"operations-{number}")
            full = run(command, output, Plan(str(output), log, at, "before", fill=what, namespace=keeper))
            ballast = list(view.glob(f"{BALLAST}*"))
            for file in ballast:
                file.unlink()
            said = full.stderr.strip().splitlines()[-1:] or [""]
            plain = full.status == 0 or "no space left on the disk" in said[0]
            outcome, detail = judge(command, output, known.tree, Plan(str(output), log, namespace=keeper), view)
        fault = f"{command.name}: no {what} from {place.kind} {place.number} of {place.path}"
        assert ballast, f"{fault}: {full}"
        if full.trouble or not plain:
            outcome, detail = full.trouble or "wrong status", f"status {full.status}\n{full.stdout}\n{full.stderr}"
        record(f"disk: no {what}", fault, outcome, detail)


def test_a_status_that_needs_more_room_is_not_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "sft-1")
    run.set_state("running")
    with failing(errno.ENOSPC, 0, monkeypatch):
        with pytest.raises(OSError, match="Errno"):
            run.set_state("failed", error="x" * 100_000)
        assert run.status["state"] == "running"
        run.set_state("failed", error="short")
    assert run.status["error"] == "short"


def test_a_full_journal_loses_nothing_that_it_has(tmp_path: Path) -> None:
    """The real limit of the size of a file, below which a line is cut off."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in range(per_kind(4)):
        file = tmp_path / f"{number}.jsonl"
        journal = Journal(file)
        journal.add({"0": Completion("first", 1, True)})
        size = file.stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20 * number + 1, before[1]))
        try:
            with pytest.raises(OSError, match="Errno") as error:
                journal.add({str(n): Completion("x" * (20 * number + 50), 1, True) for n in range(1, 9)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        line = describe_storage_error(error.value, tmp_path)
        again = Journal(file).completions
        whole = again["0"].text == "first" and "larger than a file may be" in line
        record("disk: too large", f"journal {number}", "clear line" if whole else "different result", line)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: no space left on the disk; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "here: the disk quota is exceeded; make room"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "here: no space left"),
        (ValueError("I/O error: No space left on device (os error 28)"), "here: no space left on the disk"),
        (OSError(errno.ENOENT, "No such file", "/x"), ""),
        (ValueError("something else"), ""),
    ],
)
def test_what_is_said_of_a_full_disk(error: Exception, told: str) -> None:
    assert describe_storage_error(error, "here").startswith(told)
    assert bool(describe_storage_error(error, "here")) == bool(told)
    later = RuntimeError("what followed")
    later.__cause__ = error
    assert bool(describe_storage_error(later, "here")) == bool(told)


def test_a_command_ends_in_one_line_with_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def job(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    jobs = Jobs(Path("analyze.py"), lambda: (job, lambda: 0))
    jobs.run(OmegaConf.create({"output_dir": str(tmp_path)}))
    assert jobs.end() == 1
    assert capsys.readouterr().err.count("\n") == 1
