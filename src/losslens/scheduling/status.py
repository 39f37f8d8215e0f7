"""Status of runs, from their folders and from Slurm."""

from __future__ import annotations

import os
import platform
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.runs.run import LockedError, Run, State
from losslens.scheduling.record import SubmissionRecord, read_record, record_file
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import JobState

# What a run says whose job Slurm has cancelled for another and will not start again.
NOT_REQUEUED = "preempted by Slurm, which does not requeue it (PreemptMode=CANCEL); the same command resumes it"
# How far Slurm's answers, its accounts and what nodes have written may lag behind each other.
_LAG_SECONDS = 60.0
_OUT_OF_MEMORY = re.compile(r"oom.kill|OUT_OF_MEMORY|exceeded memory limit|OutOfMemory", re.IGNORECASE)

# A running run writes its status at every logged step.
_SILENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class RunStatus:
    """Status of a run.

    Attributes:
        run: The run.
        status: Content of its `status.json`; if that is damaged, the state `damaged` and the error.
        job: Id of its last Slurm job; None if it has none.
        slurm: State of that job; None if Slurm does not know the job or cannot be queried.
        is_known: True if Slurm could be queried for the job; False also if it does not know a job that was submitted
            or seen a moment ago.
        log: Path of that job's log, or empty.
    """

    run: Run
    status: dict[str, Any]
    job: str | None
    slurm: JobState | None
    is_known: bool
    log: str

    @property
    def state(self) -> str:
        """`queued`, `running`, `preempted`, `failed`, `completed` or `damaged`."""
        return str(self.status["state"])

    @property
    def is_over(self) -> bool:
        """True if the state will not change without a new command, as far as is known."""
        if self.state in ("completed", "failed", "damaged"):
            return True
        if self.job is None:
            return self.state != "running"
        return self.is_known and not self.is_live

    @property
    def is_live(self) -> bool:
        """True if its Slurm job is pending or running."""
        return self.slurm is not None and self.slurm.is_live and self.state not in ("completed", "failed")


def refresh_run_statuses(runs: Iterable[Run]) -> list[RunStatus]:
    """Returns the status of each run; marks those as failed or preempted whose job or process has died unsaid."""
    read = [(run, *_read(run)) for run in runs]
    here = cluster.this_cluster()
    queried = {record for _, _, record in read if record and here and record.cluster == here.name}
    states = cluster.job_states(queried) if queried else {}
    result = []
    for run, status, record in read:
        slurm = (states or {}).get(record) if record else None
        is_known = states is not None and record in queried
        if record and is_known and slurm is None and may_be_alive(record, run):
            is_known = False
        elif record and is_known and (slurm is None or _has_died(slurm)):
            why = _failure_reason(run, slurm, record, str(status["state"]))
            status = mark_dead(run, record, why, was_requeued=True) or status
        if record is None and status["state"] == "running":
            status = _without_job(run, status)
        result.append(
            RunStatus(run, status, record.job if record else None, slurm, is_known, record.log if record else "")
        )
    return result


def may_be_alive(record: SubmissionRecord, run: Run | None) -> bool:
    """Returns True if a job that Slurm does not know may be alive all the same.

    It was submitted a moment ago; or its run has just written its status, or is locked by a process.

    Args:
        record: Record of the job.
        run: The run of the job, if it has one.
    """
    status = {} if run is None else _read(run)[0]
    if status.get("state") in ("completed", "failed", "damaged"):
        return False
    now = datetime.now(UTC)
    ages = []
    for text in (record.submitted, status.get("time")):
        with suppress(ValueError, TypeError):  # no time
            ages.append(abs((now - datetime.fromisoformat(str(text))).total_seconds()))
    lag = max(_LAG_SECONDS, 3 * status.get("seconds_per_step", 0.0))
    return min(ages, default=lag) < lag or (run is not None and _is_locked(run))


def _has_died(state: JobState) -> bool:
    """True if a job has ended, and what its run has written since is all that will come."""
    if state.name == "COMPLETED":
        # On a shared file system the status of its run may arrive a little later.
        return state.ended is not None and time.time() - state.ended > _LAG_SECONDS
    return not state.is_live


def _is_locked(run: Run) -> bool:
    try:
        return run.is_locked
    except OSError:  # no write permission
        return False


def mark_dead(run: Run, record: SubmissionRecord, why: str, was_requeued: bool = False) -> dict[str, Any] | None:
    """Marks a run as failed, or as preempted, if its job has ended without writing a final state.

    Args:
        run: The run.
        record: Record of its job.
        why: Reason of the failure, as far as it is known; `NOT_REQUEUED` for a preempted run.
        was_requeued: True if also a preempted run, which waits for its next attempt, has failed.

    Returns:
        The new status, or None if the run was not marked.
    """
    status = _read(run)[0]  # read again: the job may have written it after Slurm was queried
    job = status.get("slurm", {}).get("job")
    unfinished = ("running", "preempted") if was_requeued and record.submitted else ("running",)
    if not (status["state"] == "queued" or (status["state"] in unfinished and job == record.job)):
        return None
    state: State = "preempted" if why == NOT_REQUEUED else "failed"
    # Of two jobs for one run, the other may be at work.
    if (state, why) == (status["state"], status.get("error")) or _is_locked(run):
        return None
    if state == "failed" and os.path.isfile(record.log):  # noqa: PTH113  # False, not an error, in an unreadable folder of another user
        why += f"; log: {record.log}"
    slurm = {"job": record.job, "cluster": record.cluster, "log": record.log}
    try:
        run.set_state(state, error=why, slurm=slurm, **_progress(status))
    except OSError:
        return {**status, "state": state, "error": why}  # no write permission: only report it
    return run.status


def _without_job(run: Run, status: dict[str, Any]) -> dict[str, Any]:
    """Returns the status of a run that is `running` without a Slurm job, marked as failed if no process trains it.

    The process that trains a run holds its lock, which ends with the process. Another host's lock may be invisible
    here; then only the time of the last message is told.
    """
    process = status.get("process")
    host, pid = (process.get("host"), process.get("pid")) if isinstance(process, dict) else (None, None)
    name = f"process {pid} on {host}"
    if host != platform.node():
        return {**status, "error": f"{name}: no message since {status.get('time')}"} if _is_late(status) else status
    try:
        with run.lock(wait=False):
            status = run.status  # read again: it may have ended after it was read
            if status.get("state") == "running" and status.get("process") == process:
                run.set_state("failed", error=f"{name} was killed; the same command resumes", **_progress(status))
    except (LockedError, InputError):
        return status
    except OSError:  # no write permission: only report it
        return {**status, "state": "failed", "error": f"{name} was killed; the same command resumes"}
    return run.status


def _is_late(status: dict[str, Any]) -> bool:
    """True if a running run has written nothing for half an hour."""
    try:
        written = datetime.fromisoformat(str(status["time"]))
        return datetime.now(UTC) - written > _SILENCE
    except (KeyError, ValueError, TypeError):
        return False


def _progress(status: dict[str, Any]) -> dict[str, Any]:
    return {name: status[name] for name in ("step", "max_steps", "loss", "tokens_per_second") if name in status}


def log_tail(log: Path, length: int = 20_000) -> str:
    """Returns the last `length` bytes of a log as text; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - length))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def why_killed(log: str, default: str) -> str:
    """Returns "out of memory" if the log says so, else `default`."""
    return "out of memory (resources.memory_gb)" if _OUT_OF_MEMORY.search(log_tail(Path(log))) else default


def describe_exit(code: int) -> str:
    """Describes the exit status of a shell."""
    if code > 128 and code - 128 in set(signal.Signals):
        name = signal.Signals(code - 128).name
        return f"killed by {name}{', manually or because it ran out of memory' if name == 'SIGKILL' else ''}"
    return f"its process ended with exit status {code}"


def _failure_reason(run: Run, state: JobState | None, record: SubmissionRecord, reached: str) -> str:
    """Reason for the end of a job, in the words of Slurm; `reached` is the state of its run."""
    if state is not None and state.reason == "DependencyNeverSatisfied":
        # The only dependency of a run that must succeed is the sampling of its rollouts.
        return f"sampling its rollouts failed; logs: {run.folder.parents[1] / 'rollouts' / 'slurm'}"
    if state is None:
        # A waiting job of an array that is cancelled is forgotten at once.
        how = "cancelled before it started (scancel)" if reached == "queued" else "killed"
        return why_killed(record.log, f"Slurm no longer knows its job {record.job}: {how}, or its node failed")
    if state.name == "PREEMPTED":
        return NOT_REQUEUED
    if record.log and not Path(record.log).parent.is_dir():
        return f"Slurm job {record.job}: {state}; its folder of logs and code is gone: {Path(record.log).parent}"
    reasons = {
        "CANCELLED": "cancelled (scancel)",
        "NODE_FAIL": "its node failed",
        "OUT_OF_MEMORY": "out of memory (resources.memory_gb)",
        "TIMEOUT": "killed at its time limit before it could stop (resources.time, resources.signal_seconds)",
        "DEADLINE": "its deadline has passed",
        "COMPLETED": "it is COMPLETED, and its run is not: was the output folder moved or restored?",
    }
    reason = reasons.get(state.name) or why_killed(record.log, f"its job ended as {state}")
    return f"Slurm job {record.job}: {reason}"


def _read(run: Run) -> tuple[dict[str, Any], SubmissionRecord | None]:
    """The status of a run and the record of its last job."""
    try:
        status = run.status
        record = read_record(record_file(run.folder))
    except InputError as error:
        return {"state": "damaged", "error": str(error)}, None
    # A job that was not submitted by LossLens has no record, or the run has that of an earlier job.
    own = status.get("slurm")
    if own and (record is None or record.job != own["job"]) and status["state"] != "queued":
        record = SubmissionRecord(own["job"], own.get("cluster", ""), own.get("log", ""), "")
    return status or {"state": "queued"}, record
