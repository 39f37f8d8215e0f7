"""What Slurm says of itself and of its jobs, through its own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from losslens.core.errors import InputError, first_line

# Of a job that will never run again. All other states are of jobs that wait, run, or are about to go back to the queue.
_ENDED = {
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
        name: Its `ClusterName`.
        array_limit: Jobs that one array may hold.
    """

    name: str
    array_limit: int


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        name: As Slurm writes it: `PENDING`, `RUNNING`, `CANCELLED` …
        reason: Why it waits, or its exit code; may be empty.
    """

    name: str
    reason: str

    @property
    def is_live(self) -> bool:
        """Whether the job waits, runs, or will run again."""
        return self.name not in _ENDED

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason and self.reason != "None" else self.name


_known: list[Cluster] = []


def this_cluster() -> Cluster | None:
    """The cluster that this machine belongs to; None where there is none, or its controller does not answer now."""
    if not _known and (told := _ask("scontrol", "show", "config")) is not None:
        values = dict(re.findall(r"^(ClusterName|MaxArraySize)\s*=\s*(\S+)", told, re.MULTILINE))
        # Where arrays are switched off, the limit is 0, and each job is submitted alone.
        _known.append(Cluster(values.get("ClusterName", ""), max(1, int(values.get("MaxArraySize", 1001)))))
    return _known[0] if _known else None


def require_cluster() -> Cluster:
    """As `describe_environment`.

    Raises:
        InputError: There is no Slurm here, or its controller does not answer.
    """
    missing = [command for command in ("sbatch", "srun", "scontrol", "squeue") if shutil.which(command) is None]
    if missing:
        raise InputError(f"hydra/launcher=slurm: no {missing[0]} here; submit from a machine of a Slurm cluster")
    cluster = this_cluster()
    if cluster is None:
        raise InputError(f"hydra/launcher=slurm: the controller of Slurm does not answer ({_why('scontrol', 'ping')})")
    return cluster


def job_states(jobs: Iterable[str]) -> dict[str, JobState] | None:
    """What Slurm says of these jobs (`12` or, of an array, `12_3`).

    A job that it no longer knows is not among them. None when Slurm cannot be asked.
    """
    wanted = set(jobs)
    if not wanted:
        return {}
    arrays = ",".join(sorted({job.partition("_")[0] for job in wanted}))
    # A single job that is forgotten is an error to squeue, so all that is there is asked for when that happens.
    told = _ask("squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={arrays}")
    if told is None:
        told = _ask("squeue", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%r")
    if told is None:
        return None
    found = {
        job: JobState(state, reason)
        for job, state, reason in (line.strip().split("|", 2) for line in told.splitlines() if line.count("|") >= 2)
        if job in wanted
    }
    if forgotten := wanted - found.keys():
        # Where jobs are accounted for, Slurm still knows how they ended. submitit knows what `12_[3-5]` means.
        told = _ask("sacct", "--allocations", "--parsable2", "--format=JobID,State,ExitCode", f"--jobs={arrays}")
        ended = _ended_jobs(told) if told else {}
        for job in forgotten & ended.keys():
            found[job] = JobState(ended[job]["State"].split()[0], f"exit code {ended[job]['ExitCode']}")
    return found


def _ended_jobs(told: str) -> dict[str, dict[str, str]]:
    from submitit.slurm.slurm import SlurmInfoWatcher  # runs are shown where there is no submitit, too

    return SlurmInfoWatcher().read_info(told)


def with_comment(comment: str) -> list[str] | None:
    """One's own jobs whose comment ends so, those that ended just now too; None when Slurm cannot be asked."""
    # --all: also in partitions that are hidden, or closed to one's group meanwhile.
    told = _ask("squeue", "--all", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%k")
    if told is None:
        return None
    lines = [line.strip().split("|", 1) for line in told.splitlines() if "|" in line]
    return sorted(job for job, said in lines if said.endswith(comment))


def cancel(jobs: Iterable[str]) -> None:
    """Takes jobs back that were submitted a moment ago."""
    for job in jobs:
        _ask("scancel", job)


def requeue(job: str) -> bool:
    """Puts a running job back into the queue, under the same id; whether Slurm has done so."""
    return _ask("scontrol", "requeue", job) is not None


def why_stopped(job: str, restarts: int) -> Literal["preempted", "requeued", "cancelled"]:
    """Why Slurm has told a running job to stop.

    Args:
        job: Its id.
        restarts: How often it had been put back into the queue when it started (`SLURM_RESTART_COUNT`).

    Returns:
        `preempted`: it has some time yet, and is not put back into the queue if it ends by itself; also when Slurm
        cannot be asked, as a job that is cancelled is not put back. `requeued`: Slurm has put it back, and is ending
        this turn. `cancelled`: for good.
    """
    told = _ask("scontrol", "--oneliner", "show", "job", job)
    if told is None:
        return "preempted"
    counted = re.search(r"\bRestarts=(\d+)", told)
    if counted and int(counted[1]) > restarts:
        return "requeued"
    return "preempted" if "JobState=RUNNING" in told else "cancelled"


def _ask(*command: str) -> str | None:
    """What a command prints; None when it is not there or fails."""
    try:
        # Output in one form, whatever the user has set.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return outcome.stdout if outcome.returncode == 0 else None


def _why(*command: str) -> str:
    try:
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return first_line(error)
    return next((line for line in (outcome.stderr + outcome.stdout).splitlines() if line.strip()), "no answer")
