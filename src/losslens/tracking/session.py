"""A W&B run that is always closed, and whose failures never stop or change the work that it logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from losslens.config.tracking import Logger
from losslens.core.errors import first_line
from losslens.core.files import atomic_file
from losslens.core.preemption import Preempted
from losslens.core.redaction import redact
from losslens.tracking.identity import LONGEST_NAME, LONGEST_TAG, fit_name, without_environment

# Seconds; a responsive server takes about one, and a run must not wait long for one that does not respond.
_INIT_TIMEOUT = 30
_FINISH_TIMEOUT = 60


@dataclass(frozen=True)
class RunInfo:
    """Description of a run on W&B.

    Attributes:
        sweep: Name of the sweep, used as the group.
        job_type: Type of the work.
        name: Name of the run.
        tags: Tags.
        config: Configuration; paths in the home folder are replaced by `~/…` before it is sent.
    """

    sweep: str
    job_type: Literal["train", "analysis"]
    name: str
    tags: Sequence[str]
    config: Mapping[str, Any]


class Session:
    """An open W&B run, or none. The first failure is reported as a warning; afterwards nothing is sent."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    def run_safely(self, call: Callable[..., object], *arguments: object) -> None:
        """Calls `call` with the `wandb.Run` and the arguments; does nothing if there is no run or it has failed."""
        if self._run is not None and not _succeeds(lambda: call(self._run, *arguments)):
            self._run = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the metrics of a step; W&B ignores steps before the last one it has received."""
        self.run_safely(lambda run: run.log(dict(values), step=step))

    def log_late(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs metrics of a step; in a run that was resumed after it, under the next step that W&B accepts."""
        self.run_safely(lambda run: run.log(dict(values), step=max(step, run.starting_step)))


def catch_up(run: Any, metrics: Path) -> None:
    """Logs the steps of a resumed online run that W&B had not received when the run was killed.

    Args:
        run: The `wandb.Run`.
        metrics: Its `metrics.jsonl`.
    """
    if not run.resumed or not metrics.exists():
        return
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # the last line may be truncated
            values = json.loads(line)
            step = values.pop("step")
            if step >= run.starting_step:
                run.log(values, step=step)


@contextmanager
def session(settings: Logger, output_dir: Path, folder: Path, about: RunInfo) -> Iterator[Session]:
    """Opens the W&B run of the work in `folder`, and closes it with the exit status of the block.

    Offline by default: the files are in `<folder>/wandb`, for `launch/wandb_sync.py`. An online run keeps its id when
    it is resumed; offline, every segment gets its own id, since W&B does not append segments with the same id. If W&B
    cannot be reached, the run is logged offline.

    Args:
        settings: Mode, project and entity.
        output_dir: Folder of all files that are sent. W&B also sends file paths, which are made relative to it.
        folder: Folder of the run; W&B's own files are written below it.
        about: Description of the run.
    """
    if settings.name == "none":
        yield Session()
        return
    run = _open(settings, output_dir, folder, about)
    opened = Session(run)
    opened.run_safely(_clear_error)
    exit_code = 0
    try:
        yield opened
    except BaseException as error:
        exit_code = 255 if isinstance(error, KeyboardInterrupt) else 1
        message = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        opened.run_safely(lambda run: run.summary.update({"error": redact(message)}))
        if isinstance(error, Preempted):
            opened.run_safely(lambda run: run.mark_preempting())
        raise
    finally:
        if run is not None:
            # Also after a failure: an unfinished run would stay open during the next one.
            _succeeds(lambda: run.finish(exit_code=exit_code))


def _clear_error(run: Any) -> None:
    """Removes the error of the previous attempt from the summary of a resumed run."""
    if run.resumed and "error" in run.summary.keys():  # noqa: SIM118  # not a mapping
        del run.summary["error"]


def _open(settings: Logger, output_dir: Path, folder: Path, about: RunInfo) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    opened: list[Any] = []

    def init(mode: Literal["online", "offline"]) -> None:
        _restart_service_in(output_dir)
        with chdir(output_dir), without_environment():
            opened.append(_init(settings, folder, about, mode))
        _make_paths_relative(opened[-1], output_dir)

    output_dir, folder = output_dir.resolve(), folder.resolve()
    existing = set(folder.glob("wandb/run-*"))
    if settings.mode == "offline" or not _succeeds(lambda: init("online")):
        for empty in set(folder.glob("wandb/run-*")) - existing:
            shutil.rmtree(empty, ignore_errors=True)  # left by the failed attempt to go online
        _succeeds(lambda: init("offline"))
    return opened[-1] if opened else None


_service_folder: Path | None = None


def _restart_service_in(output_dir: Path) -> None:
    """Stops W&B's service process if it was started in another folder, from which it resolves relative paths.

    Keeps it while the user has an open W&B run, which would be closed with it.
    """
    global _service_folder
    import wandb

    if _service_folder not in (None, output_dir) and wandb.run is None:
        wandb.teardown()
    _service_folder = output_dir


def _init(settings: Logger, folder: Path, about: RunInfo, mode: Literal["online", "offline"]) -> Any:
    import wandb

    online = mode == "online"
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=fit_name(about.sweep, LONGEST_NAME),
        job_type=about.job_type,
        name=fit_name(about.name, LONGEST_NAME),
        tags=[fit_name(tag, LONGEST_TAG) for tag in about.tags],
        config=redact(about.config),
        dir=folder,
        mode=mode,
        id=_id_of(folder) if online else _new_id(),
        resume="allow" if online else None,
        reinit="create_new",
        settings=wandb.Settings(
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_machine_info=True,  # host, user, command line and paths
            x_save_requirements=False,
            program=Path(sys.argv[0]).name,
            sagemaker_disable=True,  # it would give all runs of a job the same id
            init_timeout=_INIT_TIMEOUT,
            x_transaction_log_flush_interval=1.0,  # seconds of entries that are lost if the process is killed
            finish_timeout=_FINISH_TIMEOUT,
            finish_timeout_raises=True,
        ),
    )


def _id_of(folder: Path) -> str:
    """The W&B id of the online run in `folder`, created on the first call."""
    file = folder / "wandb" / "id"
    existing = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
    if re.fullmatch(r"[\w-]{1,64}", existing, re.ASCII):
        return existing
    new = _new_id()
    with atomic_file(file) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return new


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def _make_paths_relative(run: Any, output_dir: Path) -> None:
    """Makes the local paths of artifact files, which W&B sends to the server, relative to and within `output_dir`.

    W&B uses absolute paths in the home folder for tables, and has no setting to change that.
    """
    interface = run._interface
    make = interface._make_artifact
    links = Path(run.settings.sync_dir) / "links"

    def make_relative(artifact: Any) -> Any:
        message = make(artifact)
        for entry in message.manifest.contents:
            if entry.local_path:
                file = Path(entry.local_path)
                if not file.is_relative_to(output_dir):  # `../../home/…` reveals as much as `/home/…`
                    link = links / uuid.uuid4().hex
                    links.mkdir(exist_ok=True)
                    link.symlink_to(file.absolute())
                    file = link
                entry.local_path = os.path.relpath(file, output_dir)
        return message

    interface._make_artifact = make_relative


def _succeeds(call: Callable[[], object]) -> bool:
    """Returns True if `call` succeeds; warns if it raises."""
    try:
        call()
    except Exception as error:
        warnings.warn(f"W&B: {redact(first_line(error))}; the run continues without it", stacklevel=2)
        return False
    return True
