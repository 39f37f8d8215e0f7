"""Submissions by what is written down before sbatch is called: one that was cut off is found in the queue again.

A submission has an id, which its jobs carry in their comment. Before sbatch is called its specs and their tasks are on
disk, so that a job needs nothing of the command that submitted it; a job whose submission was given up runs nothing.
"""

from __future__ import annotations

import shlex
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
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

_SECONDS = 10.0  # for which an sbatch may outlive the command that called it, and still submit


@dataclass(frozen=True)
class Intent:
    """One call of sbatch.

    Attributes:
        folder: Where logs and pickles go.
        id: What tells it from all others.
    """

    folder: Path
    id: str

    @classmethod
    def new(cls, folder: Path) -> Intent:
        """One that nothing is written of yet."""
        return cls(folder, uuid.uuid4().hex[:16])

    @property
    def token(self) -> Path:
        """There as long as its jobs are to run: what was to be submitted."""
        return self.folder / f"submission-{self.id}.json"

    @property
    def pending(self) -> Path:
        """There until all is recorded: the tasks of its jobs."""
        return self.folder / f"submission-{self.id}"

    @property
    def comment(self) -> str:
        """The comment of its jobs."""
        return f"losslens:{self.id}"

    @property
    def setup(self) -> list[str]:
        """Lines of shell a job begins with: it ends when its submission was given up, else puts its task in place.

        It ends as failed, so that no job starts that waits for what it should have made. Its run is marked by nobody:
        no record names it.
        """
        job = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
        gone = "The command that submitted this job was cut off, and another job does its work."
        token, tasks, folder = (shlex.quote(str(path)) for path in (self.token, self.pending, self.folder))
        task = f"{folder}/{job}_submitted.pkl"
        return [
            f"[ -e {token} ] || {{ echo {shlex.quote(gone)}; exit 1; }}",
            f"[ -e {task} ] || cp {tasks}/${{SLURM_ARRAY_TASK_ID:-0}}.pkl {task}",
        ]

    def write(
        self, here: Cluster, records: Sequence[Path], runs: Sequence[str | None], tasks: Sequence[Task], **limits: int
    ) -> None:
        """Writes down what is about to be submitted.

        Args:
            here: The cluster.
            records: Of each job the file that says as which it was submitted.
            runs: Of each job the name of its run; None for one that is not one's.
            tasks: What each job runs.
            limits: `minutes` that a job may run, `requeues` after which it ends, `processes` of a job.
        """
        self.pending.mkdir(mode=0o700, parents=True)
        for number, task in enumerate(tasks):
            delayed = submitit.helpers.DelayedSubmission(task)
            delayed.set_timeout(limits["minutes"], limits["requeues"])
            delayed.dump(self.pending / f"{number}.pkl")
            (self.pending / f"{number}.pkl").chmod(0o600)  # which the job's shell copies with its rights
        content = {
            "cluster": here.name, "processes": limits["processes"],
            "records": [str(record.absolute()) for record in records], "runs": list(runs),
        }  # fmt: skip
        write_json(self.token, content)

    def record(self, jobs: Sequence[str]) -> None:
        """Writes the record of each job, and which run is whose; then it is pending no more.

        Args:
            jobs: Their ids, in the order of the specs.
        """
        content = _content(self.token)
        # For the job's shell, when its process dies without a word.
        runs = {job: run for job, run in zip(jobs, content["runs"], strict=True) if run}
        write_json(runs_file(self.folder, jobs[0].partition("_")[0]), runs)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for number, (job, name) in enumerate(zip(jobs, content["records"], strict=True)):
            paths = submitit.SlurmJob(folder=self.folder, job_id=job, tasks=list(range(content["processes"]))).paths
            if not paths.submitted_pickle.exists():
                shutil.copy(self.pending / f"{number}.pkl", paths.submitted_pickle)
            with suppress(OSError):  # of another owner, or fetched and moved by its job at this moment
                paths.submitted_pickle.chmod(0o600)
            write_record(Path(name), SubmissionRecord(job, content["cluster"], str(paths.stdout), now))
        shutil.rmtree(self.pending)

    def give_up(self) -> None:
        """Its jobs are not to run, should there be any."""
        self.token.unlink(missing_ok=True)
        shutil.rmtree(self.pending, ignore_errors=True)

    def jobs(self, number: int) -> list[str] | None:
        """The jobs in the queue that carry its comment, in the order of its specs; empty where there are none.

        Args:
            number: How many it was to be.

        Raises:
            InputError: Slurm does not say.
        """
        found = cluster.with_comment(self.comment)
        if found is None:
            raise InputError("hydra/launcher=slurm: Slurm does not say what is in its queue; try again")
        if not found:
            return []
        array = found[0].partition("_")[0]
        return [array] if number == 1 else [f"{array}_{task}" for task in range(number)]


def private(folder: Path) -> None:
    """Makes a folder that is its owner's alone; one that is there stays as open as it is.

    The pickles of jobs hold whole addresses, with what is secret in them, and submitit writes them with the usual
    rights, in this folder and again with every requeue.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # whoever shares a sweep has opened it
        folder.mkdir(mode=0o700)


def adopt(folders: Iterable[Path], here: Cluster) -> list[str]:
    """Records the jobs of submissions that were cut off after sbatch, and gives up those that never reached the queue.

    Args:
        folders: Where submissions lie.
        here: The cluster; submissions to others are left alone.

    Returns:
        The ids of the arrays, or single jobs, that were found again.

    Raises:
        InputError: Slurm does not say what is in its queue.
    """
    adopted = []
    for folder in folders:
        for pending in sorted(folder.absolute().glob("submission-*/")):
            intent = Intent(folder.absolute(), pending.name.removeprefix("submission-"))
            if not intent.token.exists():
                intent.give_up()  # cut off before sbatch could be called
                continue
            content = _content(intent.token)
            if content["cluster"] != here.name:
                continue
            jobs = intent.jobs(len(content["records"]))
            while not jobs and time.time() - intent.token.stat().st_mtime < _SECONDS:
                time.sleep(0.5)
                jobs = intent.jobs(len(content["records"]))
            if not jobs:
                intent.give_up()
                continue
            intent.record(jobs)
            adopted.append(jobs[0].partition("_")[0])
    return adopted


def runs_file(folder: Path, array: str) -> Path:
    """Where the names of the runs of an array are written, by their jobs' ids."""
    return folder / f"{array}_runs.json"


def _content(token: Path) -> dict[str, Any]:
    content = read_json(token)
    if not isinstance(content, dict) or not {"cluster", "processes", "records", "runs"} <= content.keys():
        raise InputError(f"{token}: not what was to be submitted; delete it, and {token.with_suffix('')}")
    return content
