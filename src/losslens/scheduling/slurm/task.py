"""Execution of a submitted job on a node."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import submitit
from omegaconf import OmegaConf

from losslens.core import distributed, preemption, provenance
from losslens.core.commands import call_as_installed
from losslens.core.errors import InputError, first_line
from losslens.core.jobs import Jobs
from losslens.core.preemption import Preempted
from losslens.core.redaction import guard_streams
from losslens.runs.run import Run, State
from losslens.scheduling.code_snapshot import damage_of, is_in_package
from losslens.scheduling.record import read_record
from losslens.scheduling.slurm import cluster
from losslens.scheduling.status import NOT_REQUEUED

# Sent before the time limit (resources.signal_seconds) and, depending on the cluster, before preemption.
_TIMEOUT_SIGNAL = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]


class Task:
    """One job of an entry script; submitit pickles it and calls it on the node, again after each requeue.

    Args:
        code: The code snapshot.
        script: The entry script in it.
        config: The resolved configuration.
        run: Folder of the run; None for a job without a run.
        record: Submission record of its result.
    """

    def __init__(self, code: Path, script: Path, config: dict[str, Any], run: Path | None, record: Path) -> None:
        # Strings and built-in types only, so that unpickling imports nothing else.
        self.code = str(code)
        self.script = str(script)
        self.config = config
        self.run = None if run is None else str(run)
        self.record = str(record)
        self.submitted = datetime.now(UTC).isoformat(timespec="milliseconds")

    def __call__(self) -> None:
        """Runs the job.

        Exits with the script's status, so that Slurm sees failures. Before the time limit, or when the job is
        preempted, it writes a checkpoint and requeues itself; the next attempt resumes from the checkpoint.
        """
        guard_streams()
        if later := self._superseded_by():
            print(f"Slurm job {later} was submitted later and does the work of this job, which ends", flush=True)
            sys.exit(1)  # nonzero: what waits for its result must not start
        os.environ[provenance.JOB_LOG] = str(submitit.JobEnvironment().paths.stdout)
        requeue = signal.getsignal(_TIMEOUT_SIGNAL)  # submitit's handler: pickles this task again and requeues the job
        assert callable(requeue)
        _export_distributed_environment(self.submitted)
        # Only the main process handles the signals; the others follow it.
        (preemption.install_handlers if distributed.is_main() else preemption.ignore)(_TIMEOUT_SIGNAL, signal.SIGTERM)
        try:
            status = self._run()
        except Preempted as stop:
            self._handle_preemption(stop, requeue)
            status = 1
        except Exception:  # submitit would write the message unredacted, with any keys or addresses in it
            traceback.print_exc()  # redacted by `guard_streams`
            sys.stdout.flush()
            sys.stderr.flush()
            sys.exit(1)  # in any process, since the others would wait for it
        sys.stdout.flush()
        preemption.ignore(_TIMEOUT_SIGNAL, signal.SIGTERM)
        # Slurm kills all processes when one fails, which could cut off the output of the main process.
        if status and distributed.is_main():
            sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Returns the task that submitit runs after a requeue: this one."""
        return submitit.helpers.DelayedSubmission(self)

    def _superseded_by(self) -> str:
        """Id of the job that was submitted later for the same result; empty if there is none.

        Of two submissions, such as those of two login nodes whose locks do not know of each other, one job works.
        """
        try:
            record = read_record(Path(self.record))
        except InputError:
            return ""  # damaged
        own = provenance.slurm_job()
        if (
            not own
            or record is None
            or record.job == own["job"]
            or record.cluster != own.get("cluster", record.cluster)
        ):
            return ""
        # Before its own record is written, or seen on this node, there may be that of an earlier job.
        return record.job if record.submitted > self.submitted else ""

    def _run(self) -> int:
        """Runs the script for one job and returns its exit status."""
        if damage := damage_of(Path(self.code)):
            self._mark_failed(damage)
            return 1
        # Appended: no file of the user's takes the place of a package.
        sys.path.append(self.code)
        if is_in_package(Path(self.script)):
            call_as_installed()
        spec = importlib.util.spec_from_file_location(Path(self.script).stem, self.script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        jobs = Jobs(Path(self.script), module.load)
        jobs.run(OmegaConf.create(self.config))
        return jobs.end()

    def _handle_preemption(self, stop: Preempted, requeue: Callable[[int, None], None]) -> None:
        if not distributed.is_main():
            signal.pause()  # the main process requeues the job, and Slurm then kills this process
        if stop.signal is signal.SIGTERM:
            why = _why_stopped()
            if why == "cancelled":
                self._mark_failed("cancelled (scancel)")
            if why not in ("preempted", "evicted"):
                return
        try:
            requeue(stop.signal, None)
        except submitit.core.utils.UncompletedJobError:
            self._mark_failed("time limit reached after the last requeue (resources.time, resources.requeues)")
        except (subprocess.SubprocessError, OSError) as error:  # OSError: the folder of the tasks is gone or full
            if _why_stopped() == "evicted":
                self._set_state("preempted", NOT_REQUEUED)
            else:
                self._mark_failed(f"the job could not be requeued ({first_line(error)})")
        except SystemExit:
            # Slurm is already killing the other processes; exit handlers of libraries could not reach them.
            sys.stdout.flush()
            os._exit(255)

    def _mark_failed(self, error: str) -> None:
        """Marks the run of the job, if there is one, as failed."""
        self._set_state("failed", error)

    def _set_state(self, state: State, error: str) -> None:
        """Sets the state of the run of the job, if there is one, at the step it has reached."""
        if self.run is not None:
            run = Run(Path(self.run))
            progress = {name: run.status[name] for name in ("step", "max_steps") if name in run.status}
            run.set_state(state, error=error, **progress)
        print(error, flush=True)


def _why_stopped() -> str:
    """Reason for which Slurm has told this job to stop (`cluster.why_stopped`)."""
    return cluster.why_stopped(provenance.slurm_job()["job"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))


def _export_distributed_environment(submitted: str) -> None:
    """Sets torch.distributed's variables (rank, world size, …) if Slurm has started several processes.

    Args:
        submitted: When the job was submitted: another cluster may use its number again.
    """
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # all processes are on one node, whose name may not resolve
        # submitit's port follows from the job's number, whether it is free on this node or not.
        del os.environ["MASTER_PORT"]
        # Each attempt has a file of its own, so that none is left from one that was killed.
        attempt = f"{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        name = f"{attempt}-{submitted.replace(':', '')}.port"
        os.environ[distributed.PORT_FILE] = str(Path(os.environ[provenance.JOB_LOG]).with_name(name))
