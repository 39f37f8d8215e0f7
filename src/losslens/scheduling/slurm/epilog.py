"""Handles a failed job process: `python -m losslens.scheduling.slurm.epilog SLURM_FOLDER CODE REQUEUES`.

Called by the job's shell, which outlives a killed process. A final state that the process has written is kept.
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
from losslens.scheduling.status import describe_exit, mark_dead, why_killed


def main(folder: Path, code: int, requeues: int) -> None:
    """Marks the run of this job as failed, unless it has a final state.

    A job that was told to stop before it had installed its signal handlers, during imports, is requeued.
    """
    job = slurm_job()["job"]
    told_to_stop = code in (128 + signal.SIGUSR2, 128 + signal.SIGTERM)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    why = cluster.why_stopped(job, restarts) if told_to_stop else ""
    if why == "requeued":
        return
    if why in ("preempted", "evicted") and restarts < requeues and cluster.requeue(job):
        print(f"{describe_exit(code)} during startup; requeued", flush=True)
        return
    file = runs_file(folder, job.partition("_")[0])
    runs = read_object(file) if file.exists() else {}
    if job in runs:
        run = Run(folder.parent / runs[job])
        record = read_record(record_file(run.folder))
        if record is not None and record.job == job:
            mark_dead(run, record, f"Slurm job {job}: {why_killed(record.log, describe_exit(code))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
