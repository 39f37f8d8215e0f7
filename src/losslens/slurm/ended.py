"""`python -m losslens.slurm.ended SWEEP_FOLDER CODE REQUEUES`: what is to be done when a job's process has failed.

The job's own shell calls it, since it outlives a process that was killed. What the process told itself stands.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from losslens.errors import InputError
from losslens.provenance import slurm_job
from losslens.runs import Run
from losslens.slurm import cluster
from losslens.slurm.standing import mark_dead, why_killed
from losslens.slurm.ticket import Ticket, read_ticket


def main(sweep: Path, code: int, requeues: int) -> None:
    """Marks the run of this job as failed, unless it says already what became of it.

    A process that was told to stop before it could listen, while it still imported, goes back into the queue.
    """
    job = slurm_job()["job"]
    told_to_stop = code in (128 + signal.SIGUSR2, 128 + signal.SIGTERM)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    why = cluster.why_stopped(job, restarts) if told_to_stop else ""
    if why == "requeued":
        return
    if why == "preempted" and restarts < requeues and cluster.requeue(job):
        print(f"{said_of(code)} before it could listen; back in the queue", flush=True)
        return
    for run in (Run(file.parent) for file in sweep.glob("*/status.json")):
        ticket = _ticket_of(run, job)
        if ticket is not None:
            mark_dead(run, ticket, f"Slurm job {job}: {why_killed(ticket.log, said_of(code))}")


def _ticket_of(run: Run, job: str) -> Ticket | None:
    """The ticket of a run if it is this job's."""
    try:
        ticket = read_ticket(run.ticket)
        own = run.status.get("slurm", {})
    except InputError:
        return None
    if ticket is not None and ticket.job == job:
        return ticket
    # The ticket is written after the submission, and its writer may have died before.
    return Ticket(job, own.get("cluster", ""), own.get("log", ""), "") if own.get("job") == job else None


def said_of(code: int) -> str:
    """An exit status of a shell, in words."""
    if code > 128 and code - 128 in set(signal.Signals):
        name = signal.Signals(code - 128).name
        return f"killed by {name}{', by hand or for want of memory' if name == 'SIGKILL' else ''}"
    return f"its process ended with exit status {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
