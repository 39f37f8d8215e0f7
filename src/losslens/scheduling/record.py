"""A record: the file that says as which Slurm job something was submitted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from losslens.core.errors import InputError
from losslens.core.files import read_json, write_json


@dataclass(frozen=True)
class SubmissionRecord:
    """What was submitted, and as what.

    Attributes:
        job: Slurm's id: `12`, or `12_3` in an array.
        cluster: The cluster's name: on another one the id means another job.
        log: Path of the job's log.
        submitted: When (UTC).
    """

    job: str
    cluster: str
    log: str
    submitted: str


def record_file(run: Path) -> Path:
    """Where the folder of a run has the record of its last submission."""
    return run / "slurm.json"


def write_record(file: Path, record: SubmissionRecord) -> None:
    """Writes a record, atomically."""
    write_json(file, asdict(record))


def read_record(file: Path) -> SubmissionRecord | None:
    """The record in `file`; None when there is none.

    Raises:
        InputError: It is damaged.
    """
    if not file.exists():
        return None
    content = read_json(file)
    names = {field.name for field in fields(SubmissionRecord)}
    if not isinstance(content, dict) or set(content) != names or not all(isinstance(content[n], str) for n in names):
        raise InputError(f"{file}: not a record; delete it")
    return SubmissionRecord(**content)
