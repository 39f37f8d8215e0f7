"""Where runs stand: what their folders say, and what Slurm says of their jobs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslens.core.errors import InputError
from losslens.runs.run import Run
from losslens.scheduling.record import SubmissionRecord, read_record, record_file
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import JobState

_OUT_OF_MEMORY = re.compile(r"oom.kill|OUT_OF_MEMORY|exceeded memory limit|OutOfMemory", re.IGNORECASE)


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands.

    Attributes:
        run: The run.
        status: The content of its `status.json`; of a damaged one, state `damaged` and the error.
        job: Id of its last Slurm job; None where it has none.
        slurm: What Slurm says of that job; None where it knows no such job, or cannot be asked.
        is_known: Whether Slurm could be asked.
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
        return self.status["state"]

    @property
    def is_over(self) -> bool:
        """Whether nothing is going to change by itself, as far as one can know."""
        if self.state in ("completed", "failed", "damaged"):
            return True
        if self.job is None:
            return self.state != "running"
        return self.is_known and not self.is_live

    @property
    def is_live(self) -> bool:
        """Whether Slurm is going to run it, or does."""
        return self.slurm is not None and self.slurm.is_live and self.state not in ("completed", "failed")


def run_statuses(runs: Iterable[Run]) -> list[RunStatus]:
    """Where each run stands. A run whose job has died without a word is marked as failed, with what is known of why."""
    read = [(run, *_read(run)) for run in runs]
    here = cluster.this_cluster()
    asked = {record.job for _, _, record in read if record and here and record.cluster == here.name}
    told = cluster.job_states(asked) if asked else {}
    result = []
    for run, status, record in read:
        job = record.job if record else None
        slurm = (told or {}).get(job) if job else None
        is_known = told is not None and job in asked
        # What the folder says of a run that has just been completed may reach this machine a little later.
        if record and is_known and (slurm is None or not (slurm.is_live or slurm.name == "COMPLETED")):
            status = mark_dead(run, record, _why(run, slurm, record), was_put_back=True) or status
        result.append(RunStatus(run, status, job, slurm, is_known, record.log if record else ""))
    return result


def mark_dead(run: Run, record: SubmissionRecord, why: str, was_put_back: bool = False) -> dict[str, Any] | None:
    """Marks a run whose job has ended as failed, if the job did not say itself what became of it.

    Args:
        run: The run.
        record: Its job.
        why: What is known of the end.
        was_put_back: Whether that is the end also of a run that had stopped to go on in a further turn.

    Returns:
        Its status now, where it was marked.
    """
    status = _read(run)[0]  # once more: the job may have written it after Slurm was asked
    job = status.get("slurm", {}).get("job")
    promises = ("running", "preempted") if was_put_back and record.submitted else ("running",)
    if not (status["state"] == "queued" or (status["state"] in promises and job == record.job)):
        return None
    if os.path.isfile(record.log):  # noqa: PTH113  # of another user's folder too, which may not be looked into
        why += f"; log: {record.log}"
    kept = {name: status[name] for name in ("step", "max_steps", "loss", "tokens_per_second") if name in status}
    slurm = {"job": record.job, "cluster": record.cluster, "log": record.log}
    try:
        run.set_state("failed", error=why, slurm=slurm, **kept)
    except OSError:
        return {**status, "state": "failed", "error": why}  # only looking, where one may not write
    return run.status


def end_of(log: Path, length: int = 20_000) -> str:
    """The last characters of a log; empty when there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - length))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


def why_killed(log: str, otherwise: str) -> str:
    """`otherwise`, or that memory ran out, when the log says so."""
    return "out of memory (resources.memory_gb)" if _OUT_OF_MEMORY.search(end_of(Path(log))) else otherwise


def _why(run: Run, state: JobState | None, record: SubmissionRecord) -> str:
    if state is not None and state.reason == "DependencyNeverSatisfied":
        # Of what a run waits for, only its rollouts must not fail.
        return f"its rollouts could not be made; logs: {run.folder.parents[1] / 'rollouts' / 'slurm'}"
    if state is None:
        return why_killed(record.log, f"Slurm no longer knows its job {record.job}: killed, or its node was lost")
    known = {
        "CANCELLED": "cancelled (scancel)",
        "NODE_FAIL": "its node was lost",
        "OUT_OF_MEMORY": "out of memory (resources.memory_gb)",
        "TIMEOUT": "killed at its time limit before it could stop (resources.time, resources.signal_seconds)",
        "DEADLINE": "its deadline passed",
        "PREEMPTED": "preempted, and not put back into the queue",
    }
    said = known.get(state.name) or why_killed(record.log, f"its job ended as {state}")
    return f"Slurm job {record.job}: {said}"


def _read(run: Run) -> tuple[dict[str, Any], SubmissionRecord | None]:
    """The status of a run and the record of its last job."""
    try:
        status = run.status
        record = read_record(record_file(run.folder))
    except InputError as error:
        return {"state": "damaged", "error": str(error)}, None
    # A job that was not submitted by LossLens has no record; one from before has an old one.
    own = status.get("slurm")
    if own and (record is None or record.job != own["job"]) and status["state"] != "queued":
        record = SubmissionRecord(own["job"], own.get("cluster", ""), own.get("log", ""), "")
    return status or {"state": "queued"}, record
