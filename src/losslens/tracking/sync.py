"""Syncing of a sweep's W&B runs from disk: offline runs, and online runs whose upload was interrupted.

W&B's own service sends them, several at a time. It reports failed uploads only in its log and still marks the run as
synced; so the log is read, and the marker removed after failures.
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

from losslens.core.errors import InputError, ServerError, first_line
from losslens.core.locks import file_lock, held
from losslens.runs.run import Run, sweep_folder
from losslens.tracking.identity import without_environment

# Seconds without a write after which a file is considered abandoned if its run is not locked.
_ABANDONED_SECONDS = 60.0
# Bytes of a file without entries.
_HEADER = 7
# Limits of each request. W&B's defaults, meant for training, retry for hours; here the command can be repeated.
_RETRIES = 3
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Segment:
    """The W&B files that one process has written for a run or a part of it.

    Attributes:
        file: Its `.wandb` file.
        sweep: Folder of the sweep.
    """

    file: Path
    sweep: Path

    @property
    def name(self) -> str:
        """Its folder, relative to the sweep's."""
        return str(self.file.parent.relative_to(self.sweep))

    @property
    def is_online(self) -> bool:
        """True if it was written in online mode."""
        return not self.file.parent.name.startswith("offline-")

    @property
    def run(self) -> tuple[Path, str]:
        """Key that the segments of one W&B run share."""
        return self.file.parent.parent, self.file.stem

    @property
    def marker(self) -> Path:
        """Marker of a sent file; `wandb sync` leaves it empty, here it holds the number of bytes sent."""
        return self.file.with_suffix(".wandb.synced")

    @property
    def sending(self) -> Path:
        """Marker that exists while the file is being sent; with it, `marker` is from an interrupted process."""
        return self.file.with_suffix(".wandb.sending")

    @property
    def is_sent(self) -> bool:
        """True if the whole file has been sent, as far as is known locally."""
        if self.sending.exists():
            return False
        if self.marker.exists():
            size = self.marker.read_text(encoding="utf-8").strip()
            return not size or size == str(self.file.stat().st_size)
        return self.is_online and self._own_log.is_complete and not self._own_log.errors

    @property
    def is_locked(self) -> bool:
        """True if a process has locked the run that it belongs to."""
        return Run(self.sweep / self.file.relative_to(self.sweep).parts[0]).is_locked

    @property
    def is_open(self) -> bool:
        """True if its process may still be running: the file is not closed and was written to recently."""
        return not self._own_log.is_complete and time.time() - self.file.stat().st_mtime < _ABANDONED_SECONDS

    @property
    def _own_log(self) -> _Log:
        return _log(self.file.parent / "logs" / "debug-internal.log")


@dataclass(frozen=True)
class Outcome:
    """Result of sending a segment.

    Attributes:
        segment: The segment.
        error: Empty if it was sent.
        note: Remark to print even if it was sent.
    """

    segment: Segment
    error: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """Plan of what to send.

    Attributes:
        runs: Segments to send of each W&B run, in the order in which they were written.
        being_written: Segments that are skipped because their runs are still active.
        sent: Number of segments that were sent before.
    """

    runs: list[list[Segment]]
    being_written: list[Segment]
    sent: int


@contextmanager
def sync_lock(output_dir: Path, sweep: str) -> Iterator[None]:
    """Locks a sweep against concurrent syncing; waits if another process has locked it.

    Raises:
        InputError: The sweep does not exist.
    """
    lock = file_lock(sweep_folder(output_dir, sweep) / ".wandb-sync.lock")
    with held(lock, lambda: f"sweep {sweep}: locked by another process; waiting"):
        yield


def plan(output_dir: Path, sweep: str) -> Plan:
    """Finds the segments to send: those in `wandb` folders one or two levels below the sweep's folder.

    Of an online run with several segments, all from the first unsent one on are sent, since the last one has the run's
    exit status.

    Raises:
        InputError: The sweep does not exist.
    """
    folder = sweep_folder(output_dir, sweep)
    files = [file for depth in ("*", "*/*") for file in folder.glob(f"{depth}/wandb/*run-*/run-*.wandb")]
    segments = [Segment(file, folder) for file in files]
    by_run: dict[tuple[Path, str], list[Segment]] = {}
    newest: dict[Path, Segment] = {}
    for segment in sorted(segments, key=lambda segment: segment.file.parent.name.removeprefix("offline-")):
        by_run.setdefault(segment.run, []).append(segment)
        newest[segment.file.parent.parent] = segment
    runs, being_written, sent = [], [], 0
    for of_run in by_run.values():
        first = next((i for i, segment in enumerate(of_run) if not segment.is_sent), len(of_run))
        unsent = of_run[first:]
        sent += first
        if any(
            segment.is_locked or (segment == newest[segment.file.parent.parent] and segment.is_open)
            for segment in unsent
        ):
            being_written += unsent
        elif with_entries := [segment for segment in unsent if segment.file.stat().st_size > _HEADER]:
            runs.append(with_entries)
    return Plan(runs, being_written, sent)


def send(output_dir: Path, runs: Sequence[list[Segment]], parallel: int, on_outcome: Callable[[Outcome], None]) -> None:
    """Sends segments of `parallel` W&B runs at a time, and calls `on_outcome` for each segment.

    The first run is sent alone: runs sent concurrently would each create a new version of the rollouts they share.
    Analyses are sent last: artifacts that they use must exist, or W&B attributes them to the analysis.

    Raises:
        InputError: Not logged in to W&B.
        ServerError: The server cannot be reached.
    """
    _start_service(output_dir)
    settings = _log_in()
    trained = [run for run in runs if not run[0].name.startswith("analysis")]
    analyses = [run for run in runs if run[0].name.startswith("analysis")]
    for batch in (trained[:1], trained[1:], analyses):
        try:
            _run(partial(_send_all, batch, parallel, settings, on_outcome))
        except KeyboardInterrupt:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # hides an error for each cancelled request
            raise


def _start_service(output_dir: Path) -> None:
    """Starts W&B's service in `output_dir`, from which it resolves the relative paths of artifact files."""
    os.environ.setdefault("WANDB_SILENT", "true")
    from wandb.sdk import wandb_setup

    with chdir(output_dir), without_environment():
        wandb_setup.singleton().ensure_service()


def _log_in() -> Any:
    """Returns W&B's settings after checking that the server accepts the credentials."""
    from wandb.apis.public.service_api import ServiceApi
    from wandb.errors import AuthenticationError
    from wandb.sdk import wandb_setup
    from wandb.sdk.lib import wbauth
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    with without_environment():
        settings = wandb_setup.singleton().settings.model_copy()
    hint = f"not logged in to {settings.base_url}; run `wandb login` or set WANDB_API_KEY"
    try:
        if wbauth.authenticate_session(host=settings.base_url, source="wandb_sync", prompt=False) is None:
            raise InputError(hint)
        settings = settings.model_copy(
            update={
                # Do not send the host name and paths of the machine.
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
    runs: Sequence[list[Segment]], parallel: int, settings: Any, on_outcome: Callable[[Outcome], None]
) -> None:
    semaphore = asyncio.Semaphore(parallel)

    async def send_run(run: list[Segment]) -> None:
        async with semaphore:
            failed = ""
            for segment in run:
                if failed:
                    outcome = Outcome(segment, f"not sent, since the earlier segment {failed} failed")
                else:
                    outcome = await _send_one(segment, settings)
                failed = failed or (segment.name if outcome.error else "")
                on_outcome(outcome)

    await asyncio.gather(*(send_run(run) for run in runs))


async def _send_one(segment: Segment, settings: Any) -> Outcome:
    """Sends a segment with W&B's service, and marks it as sent only if all of it has arrived."""
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
    """Sends a file with W&B's service and returns the errors that it reports."""
    from wandb.proto.wandb_sync_pb2 import ServerSyncMessage
    from wandb.sdk import wandb_setup

    service = wandb_setup.singleton().ensure_service()
    handle = await service.init_sync(
        {file}, settings, cwd=None, live=False, entity="", project="", run_id="", job_type="", tag_replacements={}
    )
    operation = await handle.wait_async(timeout=_TIMEOUT)
    handle = await service.sync(operation.id, parallelism=1)
    response = await handle.wait_async(timeout=None)
    return [message.content for message in response.messages if message.severity >= ServerSyncMessage.SEVERITY_ERROR]


def _outcome(segment: Segment, failures: list[str], logs: list[_Log]) -> Outcome:
    errors = [error for log in logs for error in log.errors]
    # The last record of a killed process may be incomplete; everything before it was sent.
    incomplete = [failure for failure in failures if "ends with an incomplete record" in failure]
    if incomplete:
        failures = [failure for failure in failures if failure not in incomplete]
        errors = [error for error in errors if "incomplete transaction log" not in error]
    if errors or failures or not logs or not (incomplete or segment.marker.exists()):
        return Outcome(segment, _one_line([*errors[-1:], *failures, "W&B reports no reason"][0]))
    note = "its last entry is incomplete, as after a kill; everything before it was sent" if incomplete else ""
    return Outcome(segment, note=note)


@dataclass(frozen=True)
class _Log:
    errors: list[str]
    is_complete: bool


def _log(file: Path) -> _Log:
    """Reads the errors in the JSON log of W&B's service, and whether the service finished."""
    if not file.exists():
        return _Log([], False)
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):  # truncated by a kill
            entries.append(json.loads(line))
    # "api: HTTP error" contains the request; the entry after it reports the result without it.
    relevant = [entry for entry in entries if entry.get("msg") != "api: HTTP error"]
    errors = [entry for entry in relevant if str(entry.get("level")).startswith("ERROR")]
    reasons = [f"{entry['msg']}: {entry['error']}" if "error" in entry else entry["msg"] for entry in errors]
    return _Log(reasons, any(entry.get("msg") == "stream: all finished" for entry in entries[-3:]))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]
