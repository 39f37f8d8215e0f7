"""Status of runs, from their folders and from Slurm."""

from __future__ import annotations

import os
import platform
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.runs.run import LockedError, Run
from losslens.scheduling.record import SubmissionRecord, read_record, record_file
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import JobState

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
        is_known: True if Slurm could be queried for the job.
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
    """Returns the status of each run; marks runs as failed whose job or process has died without reporting it."""
    read = [(run, *_read(run)) for run in runs]
    here = cluster.this_cluster()
    queried = {record.job for _, _, record in read if record and here and record.cluster == here.name}
    states = cluster.job_states(queried) if queried else {}
    result = []
    for run, status, record in read:
        job = record.job if record else None
        slurm = (states or {}).get(job) if job else None
        is_known = states is not None and job in queried
        # A COMPLETED job is trusted: on a shared file system the status of its run may arrive a little later.
        if record and is_known and (slurm is None or not (slurm.is_live or slurm.name == "COMPLETED")):
            status = mark_dead(run, record, _failure_reason(run, slurm, record), was_requeued=True) or status
        if record is None and status["state"] == "running":
            status = _without_job(run, status)
        result.append(RunStatus(run, status, job, slurm, is_known, record.log if record else ""))
    return result


def mark_dead(run: Run, record: SubmissionRecord, why: str, was_requeued: bool = False) -> dict[str, Any] | None:
    """Marks a run as failed if its job has ended without writing a final state.

    Args:
        run: The run.
        record: Record of its job.
        why: Reason of the failure, as far as it is known.
        was_requeued: True if also a preempted run, which waits for its next attempt, has failed.

    Returns:
        The new status, or None if the run was not marked.
    """
    status = _read(run)[0]  # read again: the job may have written it after Slurm was queried
    job = status.get("slurm", {}).get("job")
    unfinished = ("running", "preempted") if was_requeued and record.submitted else ("running",)
    if not (status["state"] == "queued" or (status["state"] in unfinished and job == record.job)):
        return None
    if os.path.isfile(record.log):  # noqa: PTH113  # False, not an error, in an unreadable folder of another user
        why += f"; log: {record.log}"
    slurm = {"job": record.job, "cluster": record.cluster, "log": record.log}
    try:
        run.set_state("failed", error=why, slurm=slurm, **_progress(status))
    except OSError:
        return {**status, "state": "failed", "error": why}  # no write permission: only report it
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


def _failure_reason(run: Run, state: JobState | None, record: SubmissionRecord) -> str:
    if state is not None and state.reason == "DependencyNeverSatisfied":
        # The only dependency of a run that must succeed is the sampling of its rollouts.
        return f"sampling its rollouts failed; logs: {run.folder.parents[1] / 'rollouts' / 'slurm'}"
    if state is None:
        return why_killed(record.log, f"Slurm no longer knows its job {record.job}: killed, or its node failed")
    reasons = {
        "CANCELLED": "cancelled (scancel)",
        "NODE_FAIL": "its node failed",
        "OUT_OF_MEMORY": "out of memory (resources.memory_gb)",
        "TIMEOUT": "killed at its time limit before it could stop (resources.time, resources.signal_seconds)",
        "DEADLINE": "its deadline has passed",
        "PREEMPTED": "preempted and not requeued",
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
