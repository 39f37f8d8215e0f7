"""A run on disk: where it lies, what state it is in, and which runs a sweep holds. Nothing imports torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from losslens.config.model import Model
from losslens.core.errors import InputError
from losslens.core.files import read_json, read_object, write_json
from losslens.core.hashing import hash_json
from losslens.core.provenance import slurm_job
from losslens.models.adapters import adapter_hashes
from losslens.models.loading import model_identity, source_of
from losslens.runs.current_words import current_manifest
from losslens.runs.integrity import require_format, require_own_manifest

State = Literal["queued", "running", "preempted", "failed", "completed"]


class LockedError(Exception):
    """Another process has a run that was not to be waited for.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(f"{run.name}: {run.lock_holder} is at it")
        self.run = run


@dataclass(frozen=True)
class Run:
    """One run's folder. What lies in it is described in the README."""

    folder: Path

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Where unfinished training is kept."""
        return self.folder / "checkpoints"

    @property
    def snapshots(self) -> dict[int, Run]:
        """What was kept on the way, by step: folders with an adapter and a manifest, as those of runs."""
        folders = [file.parent for file in self.folder.glob("snapshots/step-*/manifest.json")]
        steps = {folder.name.removeprefix("step-"): folder for folder in folders}
        return {int(step): Run(steps[step]) for step in sorted(filter(str.isdigit, steps), key=int)}

    def evaluation(self, benchmark: str) -> Path:
        """The outcome of each problem of `benchmark`."""
        return self.folder / "eval" / f"{benchmark}.parquet"

    @property
    def status(self) -> dict[str, Any]:
        """The content of `status.json`; empty when the run was never started.

        Raises:
            InputError: It is damaged.
        """
        file = self.folder / "status.json"
        if not file.exists():
            return {}
        status = read_json(file)
        if not isinstance(status, dict) or status.get("state") not in get_args(State):
            raise InputError(f"{file}: no state in it; delete it, and the run goes on from what it has")
        return status

    @property
    def divergence(self) -> str:
        """What was no longer finite, and when, of a run that diverged; empty for others."""
        status = self.status
        return str(status.get("error")) if status.get("diverged") else ""

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json`, in today's form.

        Raises:
            InputError: It is damaged.
        """
        return current_manifest(read_object(self.folder / "manifest.json"))

    def is_trained(self) -> bool:
        """Whether the adapter is finished, and still the one that was trained.

        Raises:
            InputError: It was finished and has changed since, or the manifest is not this run's.
        """
        if not self.adapter.is_dir() or not (self.folder / "manifest.json").exists():
            return False
        manifest = self.manifest
        if not isinstance(manifest, dict) or "adapter_sha256" not in manifest:
            return False
        for name, value in adapter_hashes(self.adapter).items():
            if manifest.get(name) != value:
                raise InputError(
                    f"{self.adapter}: not the adapter that was trained (its {name} is not the one in manifest.json); "
                    f"delete {self.folder} to train it again"
                )
        require_own_manifest(self.folder, manifest)
        return True

    def set_state(self, state: State, **details: Any) -> None:
        """Writes `status.json` anew."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        slurm = {"slurm": job} if (job := slurm_job()) else {}
        process = {"process": {"host": platform.node(), "pid": os.getpid()}} if state == "running" else {}
        write_json(self.folder / "status.json", {"state": state, "time": now, **slurm, **process, **details})

    @property
    def is_locked(self) -> bool:
        """Whether a process has the run now."""
        if not self.lock_file.exists():
            return False
        lock = FileLock(self.lock_file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    @property
    def lock_holder(self) -> str:
        """Which process has the run, as far as its folder says: `process 12 on host`."""
        try:
            status = self.status
        except InputError:
            status = {}
        process = status.get("process") if status.get("state") == "running" else None
        return f"process {process['pid']} on {process['host']}" if process else "another process"

    @property
    def lock_file(self) -> Path:
        """What a process that has the run has locked, by whatever name of the run."""
        return self.folder.parent / f".{self.name.rpartition('-')[2]}.lock"

    @contextmanager
    def lock(self, wait: bool = True) -> Iterator[None]:
        """Holds the run, under whatever name, against other processes; waits while another one has it.

        Raises:
            HeldError: Another one has it, and `wait` is false.
            InputError: The sweep's folder cannot be made or written to.
        """
        lock = FileLock(self.lock_file)
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout as error:
            if not wait:
                raise LockedError(self) from error
            print(f"{self.name}: {self.lock_holder} is at it; waiting", flush=True)
            lock.acquire()
        except OSError as error:  # of which Timeout is one
            raise InputError(f"output_dir: {self.folder.parent}: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()


def recorded_adapter_hash(run: Run) -> str:
    """What tells the adapter of a run, or of a point on its way, from others."""
    manifest = run.manifest
    return hash_json([manifest["adapter_sha256"], manifest["adapter_config_sha256"]], 64)


def find_run(sweep: Path, identity: str) -> Run | None:
    """The run of a sweep that was started under an identity, whatever its name begins with; None if there is none.

    Args:
        sweep: The sweep's folder.
        identity: The eight digits in which its folder's name ends.
    """
    return next((Run(status.parent) for status in sweep.glob(f"*-{identity}/status.json")), None)


def base_identity(model: Model) -> dict[str, str | None]:
    """Fingerprint of a base: its content, or its commit on the hub."""
    return model_identity(source_of(model))


def base_run(sweep: Path, model: Model) -> Run:
    """The run, of no training, in which the base of a sweep is scored."""
    return Run(sweep / f"base-{model.name}-{hash_json(base_identity(model), 8)}")


def require_one_base(sweep: Path, model: Model) -> None:
    """Refuses a sweep that holds runs of another base, or of an earlier LossLens: they could not be compared.

    Args:
        sweep: The sweep's folder.
        model: The base of a run that is to be trained.

    Raises:
        InputError: There are such runs, under way or completed.
    """
    base = base_identity(model)
    for file in sorted(sweep.glob("*/status.json")):
        run = Run(file.parent)
        try:
            manifest = run.manifest
            other = manifest.get("base") if run.status.get("state") != "failed" else None
        except InputError:  # damaged, or not that far
            continue
        require_format(run.folder, manifest)
        if other is not None and other != base:
            raise InputError(
                f"model.path={model.path}: another base than that of {run.name}; sweep={sweep.name} has one base, so "
                "that its runs can be compared: put this one into a sweep of its own (sweep=NAME)"
            )


def runs_of(output_dir: Path, sweep: str) -> list[Run]:
    """Every run of a sweep that was ever started, the base first, then by name.

    Raises:
        InputError: There is no such sweep.
    """
    folder = output_dir / sweep
    if not folder.is_dir():
        raise InputError(f"sweep={sweep}: no folder {folder}")
    runs = [Run(file.parent) for file in folder.glob("*/status.json")]
    return sorted(runs, key=lambda run: (not run.name.startswith("base-"), run.name))


def arm_of(identity: Mapping[str, Any]) -> str:
    """The arm of a run: what it shares with its repeats at other seeds, as a hash; nothing else says what an arm is.

    Args:
        identity: Of the run.
    """
    return hash_json({key: value for key, value in identity.items() if key not in ("seed", "init_seed")}, 16)
