"""Write-ahead records of submissions, from which the jobs of an interrupted submission are recovered.

A submission has an id, which its jobs carry in their comment. Its specs and tasks are written to disk before sbatch is
called, so that a job does not depend on the command that submitted it. Jobs of an abandoned submission do not run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import submitit

from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json
from losslens.scheduling.record import SubmissionRecord, write_record
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import Cluster
from losslens.scheduling.slurm.task import Task

_SBATCH_SECONDS = 10.0  # an sbatch process may outlive the command that called it, and still submit
# Tasks and scripts that submitit writes before it knows the job id, and halves of this package's own files.
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh|\..+\.[0-9a-f-]+\.tmp")


@dataclass(frozen=True)
class Intent:
    """One call of sbatch.

    Attributes:
        folder: Folder of logs and pickles.
        id: Unique id of the submission.
    """

    folder: Path
    id: str

    @classmethod
    def new(cls, folder: Path) -> Intent:
        """Creates a submission with a new id; writes nothing."""
        return cls(folder, uuid.uuid4().hex[:16])

    @property
    def token(self) -> Path:
        """File that lists the submitted jobs; it exists as long as they are allowed to run."""
        return self.folder / f"submission-{self.id}.json"

    @property
    def pending(self) -> Path:
        """Folder of the tasks of its jobs; it exists until all jobs are recorded."""
        return self.folder / f"submission-{self.id}"

    @property
    def comment(self) -> str:
        """Slurm comment of its jobs."""
        return cluster.comment_of(self.id)

    @property
    def setup(self) -> list[str]:
        """First shell lines of a job: exit if the submission was abandoned, else put the task in place.

        The job then exits as failed, so that jobs that depend on it do not start. Its run is not marked as failed,
        since no record names the job.
        """
        job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
        abandoned = "The command that submitted this job was interrupted, and another job does its work."
        token, tasks, folder = (shlex.quote(str(path)) for path in (self.token, self.pending, self.folder))
        task = f"{folder}/{job}_submitted.pkl"
        return [
            f"[ -e {token} ] || {{ echo {shlex.quote(abandoned)}; exit 1; }}",
            f"[ -e {task} ] || cp {tasks}/${{SLURM_ARRAY_TASK_ID:-0}}.pkl {task}",
        ]

    def write(
        self, here: Cluster, records: Sequence[Path], runs: Sequence[str | None], tasks: Sequence[Task], **limits: int
    ) -> None:
        """Writes the submission to disk, before sbatch is called.

        Args:
            here: The cluster.
            records: File of each job's submission record.
            runs: Name of each job's run; None for a job without a run.
            tasks: Task of each job.
            limits: `minutes` that a job may run, maximum number of `requeues`, and `processes` per job.
        """
        self.pending.mkdir(mode=0o700, parents=True)
        for number, task in enumerate(tasks):
            delayed = submitit.helpers.DelayedSubmission(task)
            delayed.set_timeout(limits["minutes"], limits["requeues"])
            delayed.dump(self.pending / f"{number}.pkl")
            (self.pending / f"{number}.pkl").chmod(0o600)  # kept when the job's shell copies it
        content = {
            "cluster": here.name, "processes": limits["processes"],
            "records": [str(record.absolute()) for record in records], "runs": list(runs),
        }  # fmt: skip
        write_json(self.token, content, sealed=True)

    def record(self, jobs: Sequence[str]) -> None:
        """Writes the record of each job and the table of their runs, then removes the pending tasks.

        Args:
            jobs: Ids of the jobs, in the order of the specs.
        """
        content = _content(self.token)
        # For the epilog, which looks up the run of a killed job.
        runs = {job: run for job, run in zip(jobs, content["runs"], strict=True) if run}
        write_json(runs_file(self.folder, jobs[0].partition("_")[0]), runs)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        for number, (job, name) in enumerate(zip(jobs, content["records"], strict=True)):
            paths = submitit.SlurmJob(folder=self.folder, job_id=job, tasks=list(range(content["processes"]))).paths
            if not paths.submitted_pickle.exists():
                shutil.copy(self.pending / f"{number}.pkl", paths.submitted_pickle)
            with suppress(OSError):  # owned by another user, or just moved by its job
                paths.submitted_pickle.chmod(0o600)
            write_record(Path(name), SubmissionRecord(job, content["cluster"], str(paths.stdout), now, self.id))
        shutil.rmtree(self.pending)

    def give_up(self) -> None:
        """Abandons the submission: its jobs, if there are any, will not run."""
        self.token.unlink(missing_ok=True)
        shutil.rmtree(self.pending, ignore_errors=True)

    def jobs(self, number: int, until: float = 0.0) -> list[str]:
        """Returns its jobs in the queue, found by their comment, in the order of the specs; empty if there are none.

        Args:
            number: Number of jobs in the submission.
            until: When to stop looking for them, as `deadline` gives it; they are looked for once at least.

        Raises:
            InputError: Slurm cannot be queried.
        """
        while not (queued := cluster.jobs_with_comment(self.comment)) and queued is not None:
            if time.monotonic() >= until:
                return []
            time.sleep(0.5)
        if queued is None:
            raise InputError("hydra/launcher=slurm: the Slurm queue cannot be queried (squeue failed); try again")
        array = queued[0].partition("_")[0]
        return [array] if number == 1 else [f"{array}_{task}" for task in range(number)]


def deadline() -> float:
    """Returns when an sbatch that ends now has submitted its jobs, if it does at all (`time.monotonic`)."""
    return time.monotonic() + _SBATCH_SECONDS


def make_private_folder(folder: Path) -> None:
    """Creates a folder that only its owner can access; the permissions of an existing one are kept.

    The pickles of jobs may contain server addresses with secrets, and submitit writes them with default permissions,
    at submission and with every requeue.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # may have been opened to share the sweep
        folder.mkdir(mode=0o700)


def recover(folders: Iterable[Path], here: Cluster) -> list[str]:
    """Records the jobs of submissions that were interrupted after sbatch, and abandons those that are not in the queue.

    Args:
        folders: Folders of submissions.
        here: The cluster; submissions to other clusters are skipped.

    Returns:
        The ids of the recovered arrays or single jobs.

    Raises:
        InputError: Slurm cannot be queried.
    """
    recovered = []
    end = deadline()
    for folder in folders:
        for pending in sorted(folder.absolute().glob("submission-*/")):
            intent = Intent(folder.absolute(), pending.name.removeprefix("submission-"))
            if not intent.token.exists():
                intent.give_up()  # interrupted before sbatch was called
                continue
            content = _content(intent.token)
            if content["cluster"] != here.name:
                continue
            # Not by the age of the file: clocks jump, and that of the file server is another.
            jobs = intent.jobs(len(content["records"]), until=end)
            if not jobs:
                intent.give_up()
                continue
            for record in map(Path, content["records"]):
                for half in record.parent.glob(f".{record.name}.*.tmp"):
                    half.unlink(missing_ok=True)
            intent.record(jobs)
            recovered.append(jobs[0].partition("_")[0])
        remove_temporary_files(folder)
    return recovered


def remove_temporary_files(folder: Path, but: Collection[Path] = ()) -> None:
    """Removes what interrupted submissions have left in a folder; none may be in progress.

    Args:
        folder: Folder of submissions, or of a run that no process has locked; it need not exist.
        but: Files to keep.
    """
    for file in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(file.name) and not file.is_symlink() and file not in but:
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def runs_file(folder: Path, array: str) -> Path:
    """Returns the path of the file that maps the job ids of an array to the names of their runs."""
    return folder / f"{array}_runs.json"


def _content(token: Path) -> dict[str, Any]:
    content = read_json(token)
    if not isinstance(content, dict) or not {"cluster", "processes", "records", "runs"} <= content.keys():
        raise InputError(f"{token}: damaged record of a submission; delete it and {token.with_suffix('')}")
    return content
