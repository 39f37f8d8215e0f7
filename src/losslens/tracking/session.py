"""One W&B run, closed whatever happens, that never stops or changes the work it tells of."""

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

# Seconds. A server that answers does so in one; a run must not wait for one that does not.
_INIT_TIMEOUT = 30
_FINISH_TIMEOUT = 60


@dataclass(frozen=True)
class RunInfo:
    """What W&B shows of a run.

    Attributes:
        sweep: Its group, which ties together what belongs to one sweep.
        job_type: What it does.
        name: Its name, that of its folder.
        tags: Its tags.
        config: Its configuration; paths in the home folder are made `~/…` before it is sent.
    """

    sweep: str
    job_type: Literal["train", "analysis"]
    name: str
    tags: Sequence[str]
    config: Mapping[str, Any]


class Session:
    """An open W&B run, or none. The first thing that goes wrong is warned of, and nothing is tried after it."""

    def __init__(self, run: Any = None) -> None:
        self._run = run

    def tell(self, call: Callable[..., object], *arguments: object) -> None:
        """Calls `call` with the `wandb.Run` and the arguments, unless there is no run (any more)."""
        if self._run is not None and not _succeeds(lambda: call(self._run, *arguments)):
            self._run = None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the numbers of a step. W&B knows no way back: what lies before what it has it leaves out."""
        self.tell(lambda run: run.log(dict(values), step=step))

    def log_late(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs numbers of a step, or where the run was gone on with after it of the next one that W&B takes."""
        self.tell(lambda run: run.log(dict(values), step=max(step, run.starting_step)))


def catch_up(run: Any, metrics: Path) -> None:
    """Logs what an online run that is gone on with had logged, and W&B did not get before it was killed.

    Args:
        run: The `wandb.Run`.
        metrics: Its `metrics.jsonl`.
    """
    if not run.resumed or not metrics.exists():
        return
    for line in metrics.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):  # the last one may be cut off
            values = json.loads(line)
            step = values.pop("step")
            if step >= run.starting_step:
                run.log(values, step=step)


@contextmanager
def session(settings: Logger, output_dir: Path, folder: Path, about: RunInfo) -> Iterator[Session]:
    """Opens the W&B run of what is done in `folder`, and closes it with the status that the block ends with.

    Offline by default: the files lie in `<folder>/wandb`, for `launch/wandb_sync.py`. Online, what is gone on with
    keeps its id and is one W&B run; offline, every segment has an id of its own, since segments of one id do not
    append. Where W&B cannot be reached, the run goes on offline.

    Args:
        settings: Which mode, project and entity.
        output_dir: Below it lies all that is sent. W&B sends where files lie, too: it is told from here.
        folder: Of the run; W&B's own files go below it.
        about: What W&B shows of it.
    """
    if settings.name == "none":
        yield Session()
        return
    run = _open(settings, output_dir, folder, about)
    told = Session(run)
    told.tell(_forget_the_error)
    exit_code = 0
    try:
        yield told
    except BaseException as error:
        exit_code = 255 if isinstance(error, KeyboardInterrupt) else 1
        message = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        told.tell(lambda run: run.summary.update({"error": redact(message)}))
        if isinstance(error, Preempted):
            told.tell(lambda run: run.mark_preempting())
        raise
    finally:
        if run is not None:
            # Also when something went wrong before: what is not finished stays open for the next one.
            _succeeds(lambda: run.finish(exit_code=exit_code))


def _forget_the_error(run: Any) -> None:
    """Of a run that is gone on with, what it ended with before."""
    if run.resumed and "error" in run.summary.keys():  # noqa: SIM118, it is no mapping
        del run.summary["error"]


def _open(settings: Logger, output_dir: Path, folder: Path, about: RunInfo) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")
    opened: list[Any] = []

    def init(mode: Literal["online", "offline"]) -> None:
        _serve_from(output_dir)
        with chdir(output_dir), without_environment():
            opened.append(_init(settings, folder, about, mode))
        _tell_files_from(opened[-1], output_dir)

    output_dir, folder = output_dir.resolve(), folder.resolve()
    there = set(folder.glob("wandb/run-*"))
    if settings.mode == "offline" or not _succeeds(lambda: init("online")):
        for begun in set(folder.glob("wandb/run-*")) - there:
            shutil.rmtree(begun, ignore_errors=True)  # with nothing in it
        _succeeds(lambda: init("offline"))
    return opened[-1] if opened else None


_served_from: Path | None = None


def _serve_from(output_dir: Path) -> None:
    """Has W&B's own process, which looks for files from where it was started, end where that was another folder.

    Not while somebody has a run of his own, which would end with it.
    """
    global _served_from
    import wandb

    if _served_from not in (None, output_dir) and wandb.run is None:
        wandb.teardown()
    _served_from = output_dir


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
            x_disable_machine_info=True,  # host, user, command line, paths
            x_save_requirements=False,
            program=Path(sys.argv[0]).name,
            sagemaker_disable=True,  # it would have an id for all runs of a job
            init_timeout=_INIT_TIMEOUT,
            x_transaction_log_flush_interval=1.0,  # seconds; what is not written is lost with the process
            finish_timeout=_FINISH_TIMEOUT,
            finish_timeout_raises=True,
        ),
    )


def _id_of(folder: Path) -> str:
    """The id under which what is done in `folder` is one W&B run: a new folder begins a new one."""
    file = folder / "wandb" / "id"
    known = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
    if re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
        return known
    made = _new_id()
    with atomic_file(file) as temporary:
        temporary.write_text(made, encoding="utf-8")
    return made


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def _tell_files_from(run: Any, output_dir: Path) -> None:
    """Makes the paths of an artifact's files, which W&B sends along, relative to `output_dir`, and none leave it.

    W&B itself makes those of tables absolute, in the home folder, and has no setting for it.
    """
    interface = run._interface
    make = interface._make_artifact
    links = Path(run.settings.sync_dir) / "links"

    def make_relative(artifact: Any) -> Any:
        made = make(artifact)
        for entry in made.manifest.contents:
            if entry.local_path:
                file = Path(entry.local_path)
                if not file.is_relative_to(output_dir):  # `../../home/…` tells as much as `/home/…`
                    link = links / uuid.uuid4().hex
                    links.mkdir(exist_ok=True)
                    link.symlink_to(file.absolute())
                    file = link
                entry.local_path = os.path.relpath(file, output_dir)
        return made

    interface._make_artifact = make_relative


def _succeeds(call: Callable[[], object]) -> bool:
    """Whether `call` comes to its end; warns when it raises."""
    try:
        call()
    except Exception as error:
        warnings.warn(f"W&B: {redact(first_line(error))}; the run itself goes on", stacklevel=2)
        return False
    return True
