"""Submission records: files that name the Slurm job that was submitted for a result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json


@dataclass(frozen=True)
class SubmissionRecord:
    """Record of a submission.

    Attributes:
        job: Slurm job id: `12`, or `12_3` in an array.
        cluster: Name of the cluster, since job ids are unique only within a cluster.
        log: Path of the job's log.
        submitted: Time of the submission (UTC).
        submission: Id of the submission, which the job carries in its comment; empty in records that lack it.
    """

    job: str
    cluster: str
    log: str
    submitted: str
    submission: str = ""


def record_file(run: Path) -> Path:
    """Returns the path of the record of a run's last submission."""
    return run / "slurm.json"


def write_record(file: Path, record: SubmissionRecord) -> None:
    """Writes a record atomically."""
    write_json(file, asdict(record), sealed=True)


def read_record(file: Path) -> SubmissionRecord | None:
    """Reads a record; returns None if the file does not exist.

    Raises:
        InputError: The file is damaged.
    """
    if not file.exists():
        return None
    content = read_json(file)
    names = {field.name for field in fields(SubmissionRecord)}
    if (
        not isinstance(content, dict)
        or set(content) | {"submission"} != names
        or not all(isinstance(value, str) for value in content.values())
    ):
        raise InputError(f"{file}: not a valid submission record; delete it")
    return SubmissionRecord(**content)
