"""Decides what follows a failed process: `python -m losslens.scheduling.slurm.epilog SLURM_FOLDER CODE REQUEUES`.

The job's own shell calls it, since it outlives a process that was killed. What the process told itself stands.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from losslens.core.files import read_object
from losslens.core.provenance import slurm_job
from losslens.runs.run import Run
from losslens.scheduling.record import read_record, record_file
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.intent import runs_file
from losslens.scheduling.status import mark_dead, why_killed


def main(folder: Path, code: int, requeues: int) -> None:
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
    file = runs_file(folder, job.partition("_")[0])
    runs = read_object(file) if file.exists() else {}
    if job in runs:
        run = Run(folder.parent / runs[job])
        record = read_record(record_file(run.folder))
        if record is not None and record.job == job:
            mark_dead(run, record, f"Slurm job {job}: {why_killed(record.log, said_of(code))}")


def said_of(code: int) -> str:
    """An exit status of a shell, in words."""
    if code > 128 and code - 128 in set(signal.Signals):
        name = signal.Signals(code - 128).name
        return f"killed by {name}{', by hand or for want of memory' if name == 'SIGKILL' else ''}"
    return f"its process ended with exit status {code}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
