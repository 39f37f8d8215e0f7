"""Runs on disk: their folder, state and lock, and the runs of a sweep. Does not import torch."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import Timeout

from losslens.config.model import Model
from losslens.core.commands import command_name
from losslens.core.errors import InputError
from losslens.core.files import read_json, read_object, remove_entry, write_json
from losslens.core.hashing import hash_json
from losslens.core.locks import file_lock
from losslens.core.provenance import slurm_job
from losslens.models.loading import model_identity, source_of
from losslens.models.trained_weights import weights_hashes
from losslens.runs.current_words import current_manifest
from losslens.runs.integrity import require_format, require_own_manifest
from losslens.runs.links import require_own_links

State = Literal["queued", "running", "preempted", "failed", "completed"]


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


# Further fields of `status.json`, each with the check of its value.
_STATUS_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": _is_finite, "max_steps": _is_finite, "seconds_per_step": _is_finite,
    "tokens_per_second": _is_number, "loss": _is_number,
    "slurm": lambda value: isinstance(value, dict) and isinstance(value.get("job"), str),
    "process": lambda value: isinstance(value, dict) and {"host", "pid"} <= value.keys(),
}  # fmt: skip


class LockedError(Exception):
    """Raised when a run is locked by another process and the caller does not wait.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(f"{run.name}: locked by {run.lock_holder}")
        self.run = run


@dataclass(frozen=True)
class Run:
    """The folder of a run; the README describes its files."""

    folder: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def adapter(self) -> Path:
        """Folder of the trained weights: `model` after full fine-tuning, else `adapter`."""
        whole = self.folder / "model"
        return whole if whole.is_dir() else self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints of unfinished training."""
        return self.folder / "checkpoints"

    @property
    def snapshots(self) -> dict[int, Run]:
        """Snapshots by step: folders with an adapter and a manifest, like those of runs."""
        folders = [folder for folder in self.folder.glob("snapshots/step-*") if folder.is_dir()]
        steps = {folder.name.removeprefix("step-"): folder for folder in folders}
        return {int(step): Run(steps[step]) for step in sorted(filter(str.isdigit, steps), key=int)}

    def remove_checkpoints(self) -> None:
        """Deletes the checkpoints; a link in place of their folder stays, to an empty folder."""
        if self.checkpoints.is_symlink():
            for entry in self.checkpoints.glob("checkpoint-*"):
                with suppress(OSError):  # as below; NFS keeps what another process has open
                    remove_entry(entry)
        else:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def evaluation(self, benchmark: str) -> Path:
        """Returns the path of the outcomes on `benchmark`, one row per problem."""
        return self.folder / "eval" / f"{benchmark}.parquet"

    @property
    def status(self) -> dict[str, Any]:
        """Content of `status.json`; empty if the run was never started.

        Raises:
            InputError: The file is damaged.
        """
        file = self.folder / "status.json"
        if not file.exists():
            return {}
        if file.is_dir():
            raise InputError(f"{file}: a folder is in the place of this file; delete it")
        remedy = "delete it, and the run resumes from its last checkpoint"
        try:
            status = read_json(file)
        except InputError as error:
            raise InputError(f"{error}; {remedy}") from error
        if not isinstance(status, dict) or status.get("state") not in get_args(State):
            raise InputError(f"{file}: no valid state in it; {remedy}")
        for name, is_valid in _STATUS_FIELDS.items():
            if name in status and not is_valid(status[name]):
                raise InputError(f"{file}: {name}: not a valid value; {remedy}")
        return status

    @property
    def divergence(self) -> str:
        """Description of what became non-finite, and when, for a diverged run; empty for others."""
        status = self.status
        return str(status.get("error")) if status.get("diverged") else ""

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of `manifest.json`, under the current names of options and fields.

        Raises:
            InputError: The file is missing or damaged.
        """
        file = self.folder / "manifest.json"
        try:
            return current_manifest(read_object(file))
        except InputError as error:
            if not file.exists():
                raise
            remedy = f"delete it, and the same {command_name('train.py')} command trains the run again"
            if self.folder.parent.name == "snapshots":
                remedy = f"delete {self.folder}, and the snapshot is left out"
            raise InputError(f"{error}; {remedy}") from error

    def is_trained(self) -> bool:
        """Returns True if training is finished, after checking that the adapter is the one that was trained.

        Raises:
            InputError: The adapter has changed since training, or the manifest belongs to another run.
        """
        if not self.adapter.is_dir() or not (self.folder / "manifest.json").exists():
            return False
        manifest = self.manifest
        if not isinstance(manifest, dict) or "adapter_sha256" not in manifest:
            return False
        for name, value in weights_hashes(self.adapter).items():
            if manifest.get(name) != value:
                raise InputError(
                    f"{self.adapter}: the adapter has changed since training (its {name} is not the one in "
                    f"manifest.json); delete {self.folder} to train it again"
                )
        require_own_manifest(self.folder, manifest)
        return True

    def set_state(self, state: State, **details: Any) -> None:
        """Replaces `status.json`; on a full disk it is overwritten where it lies."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        slurm = {"slurm": job} if (job := slurm_job()) else {}
        process = {"process": {"host": platform.node(), "pid": os.getpid()}} if state == "running" else {}
        content = {"state": state, "time": now, **slurm, **process, **details}
        write_json(self.folder / "status.json", content, sealed=True, in_place=True)

    @property
    def is_locked(self) -> bool:
        """True if a process has locked the run."""
        if not self.lock_file.exists():
            return False
        lock = file_lock(self.lock_file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    @property
    def lock_holder(self) -> str:
        """The process that has locked the run, according to `status.json`: `process 12 on host`."""
        try:
            status = self.status
        except InputError:
            status = {}
        process = status.get("process") if status.get("state") == "running" else None
        return f"process {process['pid']} on {process['host']}" if process else "another process"

    @property
    def lock_file(self) -> Path:
        """Lock file of the run, the same for all folder names of one identity."""
        return self.folder.parent / f".{self.name.rpartition('-')[2]}.lock"

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[None]:
        """Locks the run against other processes; waits if another process has locked it.

        Args:
            wait: Wait for the lock; otherwise raise.

        Raises:
            LockedError: Another process has locked it, and `wait` is false.
            InputError: The sweep's folder cannot be created or written to, or a folder of the run is a link to what may
                be another's.
        """
        lock = file_lock(self.lock_file)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout as error:
            if not wait:
                raise LockedError(self) from error
            print(f"{self.name}: locked by {self.lock_holder}; waiting", flush=True)
            lock.acquire()
        except OSError as error:  # after Timeout, which is a subclass
            raise InputError(f"output_dir: {self.folder.parent}: {error.strerror}") from error
        try:
            require_own_links(self.folder)
            yield
        finally:
            lock.release()


def recorded_adapter_fingerprint(run: Run) -> str:
    """Returns the fingerprint of the adapter of a run or snapshot (weights and configuration), from its manifest."""
    manifest = run.manifest
    return hash_json([manifest["adapter_sha256"], manifest["adapter_config_sha256"]], 64)


def find_run(sweep: Path, identity: str) -> Run | None:
    """Returns the run of a sweep that was started with an identity, or None.

    Args:
        sweep: The sweep's folder.
        identity: Hash of the identity: the eight digits at the end of the folder's name.
    """
    return next((Run(status.parent) for status in sweep.glob(f"*-{identity}/status.json")), None)


def base_identity(model: Model) -> dict[str, str | None]:
    """Returns the fingerprint of a base: its content, or its commit on the Hugging Face Hub."""
    return model_identity(source_of(model))


def base_run(sweep: Path, model: Model) -> Run:
    """Returns the untrained run that holds the evaluation of a sweep's base."""
    return Run(sweep / f"base-{model.name}-{hash_json(base_identity(model), 8)}")


def require_one_base(sweep: Path, model: Model) -> None:
    """Refuses a sweep with runs of another base, or of an earlier version: they could not be compared.

    Args:
        sweep: The sweep's folder.
        model: The base of the run to train.

    Raises:
        InputError: There are such runs, unfinished or completed.
    """
    base = base_identity(model)
    for file in sorted(sweep.glob("*/status.json")):
        run = Run(file.parent)
        try:
            manifest = run.manifest
            other = manifest.get("base") if run.status.get("state") != "failed" else None
        except InputError:  # damaged, or not written yet
            continue
        require_format(run.folder, manifest)
        if other is not None and other != base:
            raise InputError(
                f"model.path={model.path}: not the base of {run.name}; all runs of a sweep (sweep={sweep.name}) must "
                "have the same base to be comparable: use another sweep for this one (sweep=NAME)"
            )


def sweep_folder(output_dir: Path, sweep: str) -> Path:
    """Returns the folder of a sweep, which lies in `output_dir`.

    Raises:
        InputError: The sweep does not exist, or its name leads out of `output_dir`.
    """
    if sweep in ("", ".", "..") or Path(sweep).name != sweep:
        raise InputError(f"sweep={sweep}: not the name of a sweep: it must be the name of a folder in {output_dir}")
    folder = output_dir / sweep
    if not folder.is_dir():
        raise InputError(f"sweep={sweep}: no such sweep: {folder} does not exist")
    return folder


def runs_of(output_dir: Path, sweep: str) -> list[Run]:
    """Returns all runs of a sweep that were ever started, the base first, then by name.

    Raises:
        InputError: As for `sweep_folder`.
    """
    folder = sweep_folder(output_dir, sweep)
    runs = [Run(file.parent) for file in folder.glob("*/status.json")]
    return sorted(runs, key=lambda run: (not run.name.startswith("base-"), run.name))


def arm_of(identity: Mapping[str, Any]) -> str:
    """Returns the arm of a run: the hash of its identity without the seeds. This is the only definition of an arm.

    Args:
        identity: Identity of the run.
    """
    return hash_json({key: value for key, value in identity.items() if key not in ("seed", "init_seed")}, 16)
