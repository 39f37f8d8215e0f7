"""Queries to Slurm about the cluster and its jobs, through Slurm's own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

from losslens.core.errors import InputError, first_line
from losslens.scheduling.record import SubmissionRecord

# States of jobs that will never run again; in all others a job is pending, running or about to be requeued.
_FINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


@dataclass(frozen=True)
class Cluster:
    """A cluster as `scontrol show config` describes it.

    Attributes:
        name: `ClusterName`.
        array_limit: Maximum number of jobs in an array.
    """

    name: str
    array_limit: int


@dataclass(frozen=True)
class JobState:
    """State of a Slurm job.

    Attributes:
        name: Slurm's name of the state: `PENDING`, `RUNNING`, `CANCELLED` …
        reason: Why the job is pending, or its exit code; may be empty.
        ended: When it ended or will end at the latest (seconds since 1970); None if Slurm does not say.
    """

    name: str
    reason: str
    ended: float | None = None

    @property
    def is_live(self) -> bool:
        """True if the job is pending, running or will run again."""
        return self.name not in _FINAL_STATES

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason and self.reason != "None" else self.name


_known: list[Cluster] = []


def this_cluster() -> Cluster | None:
    """Returns the cluster of this machine; None if there is none or its controller does not respond."""
    if not _known and (output := _query("scontrol", "show", "config")) is not None:
        values = dict(re.findall(r"^(ClusterName|MaxArraySize)\s*=\s*(\S+)", output, re.MULTILINE))
        limits = [values.get("MaxArraySize", "1001"), *re.findall(r"\bmax_array_tasks=(\d+)", output)]
        # The limit is 0 if arrays are disabled; each job is then submitted by itself.
        _known.append(Cluster(values.get("ClusterName", ""), max(1, min(map(int, limits)))))
    return _known[0] if _known else None


def require_cluster() -> Cluster:
    """Returns the cluster of this machine.

    Raises:
        InputError: Slurm is not installed on this machine, or its controller does not respond.
    """
    missing = [command for command in ("sbatch", "srun", "scontrol", "squeue") if shutil.which(command) is None]
    if missing:
        raise InputError(
            f"hydra/launcher=slurm: {missing[0]} not found on this machine; submit from a machine of a Slurm cluster"
        )
    cluster = this_cluster()
    if cluster is None:
        reason = _error_of("scontrol", "ping")
        raise InputError(f"hydra/launcher=slurm: the Slurm controller does not respond ({reason})")
    return cluster


class _Row(NamedTuple):
    """A job as squeue or sacct lists it."""

    state: JobState
    command: str
    comment: str


def job_states(records: Iterable[SubmissionRecord]) -> dict[SubmissionRecord, JobState] | None:
    """Returns the states of the jobs of submission records; None if Slurm cannot be queried.

    Jobs that Slurm no longer knows are left out, and so are other jobs under the same id: a reinstalled cluster counts
    from 1 again.
    """
    wanted = set(records)
    if not wanted:
        return {}
    arrays = ",".join(sorted({record.job.partition("_")[0] for record in wanted}))
    squeue = ("squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%r|%e|%o|%k")
    # squeue fails if it no longer knows a single requested job; all jobs are then requested.
    output = _query(*squeue, f"--jobs={arrays}")
    if output is None:
        output = _query(*squeue)
    if output is None:
        return None
    rows = _queued_rows(output)
    if any(record.job not in rows for record in wanted):
        # With job accounting, Slurm still knows how they ended.
        fields = "--format=JobID,State,ExitCode,End,Comment"
        output = _query("sacct", "--allocations", "--parsable2", fields, f"--jobs={arrays}")
        rows = {**_accounted_rows(output or ""), **rows}
    return {record: row.state for record in wanted if (row := rows.get(record.job)) and _is_of(row, record)}


def _queued_rows(output: str) -> dict[str, _Row]:
    rows = {}
    for line in output.splitlines():
        job, state, reason, end, command, comment = [*line.strip().split("|", 5), *[""] * 5][:6]
        rows[job] = _Row(JobState(state, reason, _timestamp(end)), command, comment)
    return rows


def _accounted_rows(output: str) -> dict[str, _Row]:
    """The ended jobs that sacct lists."""
    from submitit.slurm.slurm import SlurmInfoWatcher  # runs are shown where there is no submitit, too

    rows = {}
    # submitit parses ids such as `12_[3-5]`.
    for job, values in SlurmInfoWatcher().read_info(output).items():
        name = values["State"].split()[0] if values["State"] else ""
        # squeue does not list these jobs, so none of them runs: the accounts lag behind, or have missed their end.
        if name in _FINAL_STATES:
            state = JobState(name, f"exit code {values['ExitCode']}", _timestamp(values.get("End", "")))
            rows[job] = _Row(state, "", values.get("Comment", ""))
    return rows


def _is_of(row: _Row, record: SubmissionRecord) -> bool:
    """True if a job is the one of a record, and not another with the same id."""
    marked = re.search(r"\blosslens:([0-9a-f]{16})$", row.comment)
    if marked and record.submission:
        return marked[1] == record.submission
    # Some sites replace comments. The batch script lies beside the log.
    return row.command in ("", "(null)") or not record.log or Path(row.command).parent == Path(record.log).parent


def _timestamp(text: str) -> float | None:
    """Reads a time as Slurm prints it, in local time; None for `N/A`, `Unknown` and the like."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def comment_of(submission: str) -> str:
    """Returns the end of the comment that marks the jobs of a submission."""
    return f"losslens:{submission}"


def jobs_with_comment(comment: str) -> list[str] | None:
    """Returns the user's jobs whose comment ends with `comment`, including recently ended ones; None without Slurm."""
    # --all: also in partitions that are hidden or no longer accessible.
    output = _query(
        "squeue", "--all", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%k"
    )
    if output is None:
        return None
    lines = [line.strip().split("|", 1) for line in output.splitlines() if "|" in line]
    return sorted(job for job, job_comment in lines if job_comment.endswith(comment))


def cancel(jobs: Iterable[str]) -> bool:
    """Cancels jobs; returns True if Slurm accepts all of it."""
    accepted = [_query("scancel", job) is not None for job in jobs]  # each of them, also after a refusal
    return all(accepted)


def requeue(job: str) -> bool:
    """Requeues a running job under the same id; returns True if Slurm accepts."""
    return _query("scontrol", "requeue", job) is not None


def why_stopped(job: str, restarts: int) -> Literal["preempted", "requeued", "evicted", "cancelled"]:
    """Returns why Slurm has told a running job to stop.

    Args:
        job: Its id.
        restarts: How often it had been requeued when it started (`SLURM_RESTART_COUNT`).

    Returns:
        `preempted`: it is still running for a grace period and will not be requeued by Slurm if it exits; also if
        Slurm cannot be queried, which is safe because Slurm does not requeue cancelled jobs. `requeued`: Slurm has
        requeued it and is ending this attempt. `evicted`: it was preempted and is being ended, and Slurm will not
        requeue it (`PreemptMode=CANCEL`), unless the job asks for that. `cancelled`: it will not run again for another
        reason.
    """
    output = _query("scontrol", "--oneliner", "show", "job", job)
    if output is None:
        return "preempted"
    values = dict(re.findall(r"\b(Restarts|JobState|StartTime|PreemptTime)=(\S+)", output))
    if int(values.get("Restarts", "0")) > restarts:
        return "requeued"
    if values.get("JobState") == "RUNNING":
        return "preempted"
    # Meanwhile its state is COMPLETING, whatever ended it. An earlier attempt may have been preempted, too.
    preempted = _timestamp(values.get("PreemptTime", ""))
    return "evicted" if preempted is not None and preempted >= (_timestamp(values["StartTime"]) or 0) else "cancelled"


def _query(*command: str) -> str | None:
    """Runs a command and returns its output; None if it is not found or fails."""
    try:
        # Without the user's settings of the output format.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
        environment["SLURM_TIME_FORMAT"] = "standard"
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return outcome.stdout if outcome.returncode == 0 else None


def _error_of(*command: str) -> str:
    """The first line that a command prints."""
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return first_line(error)
    return next((line for line in (outcome.stderr + outcome.stdout).splitlines() if line.strip()), "no answer")
