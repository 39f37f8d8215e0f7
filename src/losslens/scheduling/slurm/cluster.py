"""Queries to Slurm about the cluster and its jobs, through Slurm's own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from losslens.core.errors import InputError, first_line

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
    """

    name: str
    reason: str

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
        # The limit is 0 if arrays are disabled; each job is then submitted by itself.
        _known.append(Cluster(values.get("ClusterName", ""), max(1, int(values.get("MaxArraySize", 1001)))))
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


def job_states(jobs: Iterable[str]) -> dict[str, JobState] | None:
    """Returns the states of jobs by id (`12`, or `12_3` in an array); None if Slurm cannot be queried.

    Jobs that Slurm no longer knows are left out.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    arrays = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    # squeue fails if it no longer knows a single requested job; all jobs are then requested.
    output = _query("squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={arrays}")
    if output is None:
        output = _query("squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%r")
    if output is None:
        return None
    states = {
        job: JobState(state, reason)
        for job, state, reason in (line.strip().split("|", 2) for line in output.splitlines() if line.count("|") >= 2)
        if job in wanted
    }
    if unknown := wanted - states.keys():
        # With job accounting, Slurm still knows how they ended. submitit parses ids such as `12_[3-5]`.
        output = _query("sacct", "--allocations", "--parsable2", "--format=JobID,State,ExitCode", f"--jobs={arrays}")
        ended = _ended_jobs(output) if output else {}
        for job in unknown & ended.keys():
            states[job] = JobState(ended[job]["State"].split()[0], f"exit code {ended[job]['ExitCode']}")
    return states


def _ended_jobs(output: str) -> dict[str, dict[str, str]]:
    from submitit.slurm.slurm import SlurmInfoWatcher  # runs are shown where there is no submitit, too

    return SlurmInfoWatcher().read_info(output)


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


def cancel(jobs: Iterable[str]) -> None:
    """Cancels jobs."""
    for job in jobs:
        _query("scancel", job)


def requeue(job: str) -> bool:
    """Requeues a running job under the same id; returns True if Slurm accepts."""
    return _query("scontrol", "requeue", job) is not None


def why_stopped(job: str, restarts: int) -> Literal["preempted", "requeued", "cancelled"]:
    """Returns why Slurm has told a running job to stop.

    Args:
        job: Its id.
        restarts: How often it had been requeued when it started (`SLURM_RESTART_COUNT`).

    Returns:
        `preempted`: it is still running for a grace period and will not be requeued by Slurm if it exits; also if
        Slurm cannot be queried, which is safe because Slurm does not requeue cancelled jobs. `requeued`: Slurm has
        requeued it and is ending this attempt. `cancelled`: it will not run again.
    """
    output = _query("scontrol", "--oneliner", "show", "job", job)
    if output is None:
        return "preempted"
    counted = re.search(r"\bRestarts=(\d+)", output)
    if counted and int(counted[1]) > restarts:
        return "requeued"
    return "preempted" if "JobState=RUNNING" in output else "cancelled"


def _query(*command: str) -> str | None:
    """Runs a command and returns its output; None if it is not found or fails."""
    try:
        # Without the user's settings of the output format.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
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
