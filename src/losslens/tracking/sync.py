"""Sends the W&B runs of a sweep that lie on the disk: offline ones, and online ones whose upload was cut off.

W&B's own service sends them, several at a time. What did not arrive it writes into its log only, and marks the run as
synced all the same; so the log is read, and the mark taken back.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from losslens.core.errors import InputError, ServerError, first_line
from losslens.runs.run import Run
from losslens.tracking.identity import without_environment

# Seconds: a file that nothing was written to for so long, and whose run nobody holds, is nobody's any more.
_QUIET = 60.0
# Bytes of a file with nothing in it.
_HEADER = 7
# Of each request. W&B's own numbers are meant for training that waits for its server: hours. Here one can ask again.
_RETRIES = 3
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Segment:
    """The folder of W&B files that one process left, for a run or a part of it.

    Attributes:
        file: Its `.wandb` file.
        sweep: The folder of the sweep that it lies below.
    """

    file: Path
    sweep: Path

    @property
    def name(self) -> str:
        """Its folder, as seen from the sweep."""
        return str(self.file.parent.relative_to(self.sweep))

    @property
    def is_online(self) -> bool:
        """Whether it was sent while it was written."""
        return not self.file.parent.name.startswith("offline-")

    @property
    def run(self) -> tuple[Path, str]:
        """What the segments of one W&B run have in common."""
        return self.file.parent.parent, self.file.stem

    @property
    def marker(self) -> Path:
        """What `wandb sync` makes when it has sent the file, empty. Here it holds how many bytes of it were sent."""
        return self.file.with_suffix(".wandb.synced")

    @property
    def sending(self) -> Path:
        """There while the file is sent: a marker beside it is from a process that did not come to its end."""
        return self.file.with_suffix(".wandb.sending")

    @property
    def is_sent(self) -> bool:
        """Whether all of it has arrived, as far as is known here."""
        if self.sending.exists():
            return False
        if self.marker.exists():
            size = self.marker.read_text(encoding="utf-8").strip()
            return not size or size == str(self.file.stat().st_size)
        return self.is_online and self._own_log.is_whole and not self._own_log.errors

    @property
    def is_locked(self) -> bool:
        """Whether a process has the run that it lies below."""
        return Run(self.sweep / self.file.relative_to(self.sweep).parts[0]).is_locked

    @property
    def is_open(self) -> bool:
        """Whether its process may still be at work: it has not closed the file, and has written to it a moment ago."""
        return not self._own_log.is_whole and time.time() - self.file.stat().st_mtime < _QUIET

    @property
    def _own_log(self) -> _Log:
        return _log(self.file.parent / "logs" / "debug-internal.log")


@dataclass(frozen=True)
class Outcome:
    """What became of a segment: `error` is empty when it has arrived, `note` what is to be said even then."""

    segment: Segment
    error: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What there is to send.

    Attributes:
        runs: The segments of each W&B run, in the order in which they were written.
        being_written: What is left for later.
        sent: How many segments have been sent before.
    """

    runs: list[list[Segment]]
    being_written: list[Segment]
    sent: int


@contextmanager
def claimed(output_dir: Path, sweep: str) -> Iterator[None]:
    """Waits until nobody else sends the sweep; what they send would be sent again.

    Raises:
        InputError: There is no such sweep.
    """
    lock = FileLock(_folder(output_dir, sweep) / ".wandb-sync.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"sweep {sweep}: another process sends it; waiting", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def plan(output_dir: Path, sweep: str) -> Plan:
    """What of a sweep is to be sent: whatever lies in a `wandb` folder one or two levels below it.

    Of an online run that came in segments, all from the first that did not arrive: the last one tells how it ended.

    Raises:
        InputError: There is no such sweep.
    """
    folder = _folder(output_dir, sweep)
    files = [file for depth in ("*", "*/*") for file in folder.glob(f"{depth}/wandb/*run-*/run-*.wandb")]
    segments = [Segment(file, folder) for file in files]
    by_run: dict[tuple[Path, str], list[Segment]] = {}
    newest: dict[Path, Segment] = {}
    for segment in sorted(segments, key=lambda segment: segment.file.parent.name.removeprefix("offline-")):
        by_run.setdefault(segment.run, []).append(segment)
        newest[segment.file.parent.parent] = segment
    runs, being_written, sent = [], [], 0
    for all_of_run in by_run.values():
        first = next((i for i, segment in enumerate(all_of_run) if not segment.is_sent), len(all_of_run))
        rest = all_of_run[first:]
        sent += first
        if any(
            segment.is_locked or (segment == newest[segment.file.parent.parent] and segment.is_open) for segment in rest
        ):
            being_written += rest
        elif with_entries := [segment for segment in rest if segment.file.stat().st_size > _HEADER]:
            runs.append(with_entries)
    return Plan(runs, being_written, sent)


def _folder(output_dir: Path, sweep: str) -> Path:
    folder = output_dir / sweep
    if not folder.is_dir():
        raise InputError(f"sweep={sweep}: no folder {folder}")
    return folder


def send(output_dir: Path, runs: Sequence[list[Segment]], parallel: int, told: Callable[[Outcome], None]) -> None:
    """Sends segments, `parallel` W&B runs at a time; `told` hears of each as it ends.

    The first one goes alone: several at once that bring the same rollouts would each make a version of them. What is in
    `analysis` folders comes last: what it says to have used has to be there, or W&B takes the analysis for its maker.

    Raises:
        InputError: Nobody is logged in.
        ServerError: The server cannot be reached.
    """
    _start_service(output_dir)
    settings = _log_in()
    makers = [run for run in runs if not run[0].name.startswith("analysis")]
    users = [run for run in runs if run[0].name.startswith("analysis")]
    for wave in (makers[:1], makers[1:], users):
        try:
            _run(partial(_send_all, wave, parallel, settings, told))
        except KeyboardInterrupt:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # each request that is given up would say so
            raise


def _start_service(output_dir: Path) -> None:
    """Where W&B's service is started, it looks for the files of artifacts: they are told from `output_dir`."""
    os.environ.setdefault("WANDB_SILENT", "true")
    from wandb.sdk import wandb_setup

    with chdir(output_dir), without_environment():
        wandb_setup.singleton().ensure_service()


def _log_in() -> Any:
    """W&B's settings, with credentials that the server takes."""
    from wandb.apis.public.service_api import ServiceApi
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    with without_environment():
        settings = wandb_setup.singleton().settings.model_copy()
    hint = f"not logged in to {settings.base_url}; `wandb login` asks for the key, or set WANDB_API_KEY"
    try:
        if wbauth.authenticate_session(host=settings.base_url, source="wandb_sync", prompt=False) is None:
            raise InputError(hint)
        settings = settings.model_copy(
            update={
                # What the machine that sends is called, and where things lie on it, is nobody's business.
                "x_disable_machine_info": True,
                "x_disable_meta": True,
                "program": "wandb_sync.py",
                "x_graphql_retry_max": _RETRIES,
                "x_graphql_timeout_seconds": _TIMEOUT,
                "x_file_stream_retry_max": _RETRIES,
                "x_file_stream_timeout_seconds": _TIMEOUT,
                "x_file_transfer_retry_max": _RETRIES,
            }
        )
        ServiceApi(settings.model_copy(update={"x_graphql_retry_max": 1})).authenticate(timeout=_TIMEOUT)
    except AuthenticationError as error:
        raise InputError(f"{hint} ({first_line(error)})") from error
    except WandbApiFailedError as error:
        if error.response is not None and error.response.http_status in (401, 403):
            raise InputError(f"{hint} ({_one_line(str(error))})") from error
        raise ServerError(f"{settings.base_url}: {_one_line(str(error))}") from error
    return settings


def _run(work: Callable[[], Awaitable[None]]) -> None:
    from wandb.sdk import wandb_setup

    wandb_setup.singleton().asyncer.run(work)


async def _send_all(
    runs: Sequence[list[Segment]], parallel: int, settings: Any, told: Callable[[Outcome], None]
) -> None:
    at_a_time = asyncio.Semaphore(parallel)

    async def one(run: list[Segment]) -> None:
        async with at_a_time:
            stays = ""
            for segment in run:
                outcome = Outcome(segment, f"comes after {stays}") if stays else await _send_one(segment, settings)
                stays = stays or (segment.name if outcome.error else "")
                told(outcome)

    await asyncio.gather(*(one(run) for run in runs))


async def _send_one(segment: Segment, settings: Any) -> Outcome:
    """Has W&B's service send a segment, and marks it as sent when all of it has arrived, and only then."""
    try:
        segment.sending.touch()
        size = segment.file.stat().st_size
        with tempfile.TemporaryDirectory(prefix="wandb-sync-") as folder:
            failures = await _sync(segment.file.absolute(), settings.model_copy(update={"root_dir": folder}))
            logs = [_log(file) for file in Path(folder).glob("*/logs/debug-sync.*.log")]
        outcome = _outcome(segment, failures, logs)
        if outcome.error:
            segment.marker.unlink(missing_ok=True)
        else:
            segment.marker.write_text(f"{size}\n", encoding="utf-8")
        segment.sending.unlink()
    except Exception as error:
        return Outcome(segment, f"{type(error).__name__}: {first_line(error)}")
    return outcome


async def _sync(file: Path, settings: Any) -> list[str]:
    """Has W&B's service send the file, and gives what it says went wrong."""
    from wandb.proto.wandb_sync_pb2 import ServerSyncMessage
    from wandb.sdk import wandb_setup

    service = wandb_setup.singleton().ensure_service()
    handle = await service.init_sync(
        {file}, settings, cwd=None, live=False, entity="", project="", run_id="", job_type="", tag_replacements={}
    )
    begun = await handle.wait_async(timeout=_TIMEOUT)
    handle = await service.sync(begun.id, parallelism=1)
    response = await handle.wait_async(timeout=None)
    return [message.content for message in response.messages if message.severity >= ServerSyncMessage.SEVERITY_ERROR]


def _outcome(segment: Segment, failures: list[str], logs: list[_Log]) -> Outcome:
    errors = [error for log in logs for error in log.errors]
    # What a process that was killed had not written is nowhere; all else was sent.
    cut = [failure for failure in failures if "ends with an incomplete record" in failure]
    if cut:
        failures = [failure for failure in failures if failure not in cut]
        errors = [error for error in errors if "incomplete transaction log" not in error]
    if errors or failures or not logs or not (cut or segment.marker.exists()):
        return Outcome(segment, _one_line([*errors[-1:], *failures, "W&B does not say why"][0]))
    return Outcome(
        segment, note="its last entry is cut off, as after a kill; what is before it was sent" if cut else ""
    )


@dataclass(frozen=True)
class _Log:
    errors: list[str]
    is_whole: bool


def _log(file: Path) -> _Log:
    """What the JSON log of W&B's service says went wrong, and whether it came to its end."""
    if not file.exists():
        return _Log([], False)
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):  # cut off by a kill
            entries.append(json.loads(line))
    # The first is about a request; what became of it without what it asked is told after it.
    told = [entry for entry in entries if entry.get("msg") != "api: HTTP error"]
    errors = [entry for entry in told if str(entry.get("level")).startswith("ERROR")]
    reasons = [f"{entry['msg']}: {entry['error']}" if "error" in entry else entry["msg"] for entry in errors]
    return _Log(reasons, any(entry.get("msg") == "stream: all finished" for entry in entries[-3:]))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
