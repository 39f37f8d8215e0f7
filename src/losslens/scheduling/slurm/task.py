"""What runs on the node: one job of an entry script, as it was submitted."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import submitit
from omegaconf import OmegaConf

from losslens.core import distributed, preemption, provenance
from losslens.core.commands import call_as_installed
from losslens.core.errors import first_line
from losslens.core.jobs import Jobs
from losslens.core.preemption import Preempted
from losslens.core.redaction import guard_streams
from losslens.runs.run import Run
from losslens.scheduling.code_snapshot import is_in_package
from losslens.scheduling.slurm import cluster

# Sent before the time limit (resources.signal_seconds), and, where the cluster is set up so, before preemption.
_TIME_IS_UP = signal.Signals[f"SIG{submitit.JobEnvironment.USR_SIG}"]


class Task:
    """One job of an entry script. submitit keeps it on disk and calls it on the node, again after each requeue.

    Args:
        code: The copy of the code.
        script: The entry script in it.
        config: The configuration, resolved.
        run: Folder of the run; None for a job that is not one's.
    """

    def __init__(self, code: Path, script: Path, config: dict[str, Any], run: Path | None) -> None:
        # As text: what is pickled is to need nothing to be read again.
        self.code = str(code)
        self.script = str(script)
        self.config = config
        self.run = None if run is None else str(run)

    def __call__(self) -> None:
        """Runs the job.

        It exits with the script's status, so that Slurm sees a failure as one. When the time is up, or the job is
        preempted, it writes its checkpoint, asks to be put back into the queue, and goes on there next time.
        """
        guard_streams()
        os.environ[provenance.JOB_LOG] = str(submitit.JobEnvironment().paths.stdout)
        requeue = signal.getsignal(_TIME_IS_UP)  # submitit's own: it writes this task down again and requeues the job
        assert callable(requeue)
        _one_of_several()
        # Of several processes the main one listens, and the others follow.
        (preemption.install_handlers if distributed.is_main() else preemption.ignore)(_TIME_IS_UP, signal.SIGTERM)
        try:
            status = self._run()
        except Preempted as stop:
            self._stopped(stop, requeue)
            status = 1
        except Exception:  # submitit would keep its text as it is, with whatever key or address stands in it
            traceback.print_exc()  # through the guard
            sys.stdout.flush()
            sys.stderr.flush()
            sys.exit(1)  # of whichever process: the others would wait for it
        sys.stdout.flush()
        preemption.ignore(_TIME_IS_UP, signal.SIGTERM)
        # Slurm ends all processes when one ends with a failure, and would cut off what the main one still says.
        if status and distributed.is_main():
            sys.exit(status)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit is to run next time: the same."""
        return submitit.helpers.DelayedSubmission(self)

    def _run(self) -> int:
        """Does what the script does for one job; its exit status."""
        # Last: no file of one's own that lies beside the losses takes the place of a package.
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

    def _stopped(self, stop: Preempted, requeue: Callable[[int, None], None]) -> None:
        if not distributed.is_main():
            signal.pause()  # the main process puts the job back into the queue, and Slurm ends this one
        if stop.signal is signal.SIGTERM:
            why = cluster.why_stopped(provenance.slurm_job()["job"], int(os.environ.get("SLURM_RESTART_COUNT", "0")))
            if why == "cancelled":
                self._mark("cancelled (scancel)")
            if why != "preempted":
                return
        try:
            requeue(stop.signal, None)
        except submitit.core.utils.UncompletedJobError:
            self._mark("its time limit was reached once too often (resources.time, resources.requeues)")
        except subprocess.SubprocessError as error:
            self._mark(f"it was to go back into the queue, and Slurm did not take it ({first_line(error)})")
        except SystemExit:
            # Slurm is ending this job's other processes already; what libraries would send them at exit gets lost.
            sys.stdout.flush()
            os._exit(255)

    def _mark(self, error: str) -> None:
        """Marks the run, where the job is one's, as failed, at the step it has reached."""
        if self.run is not None:
            run = Run(Path(self.run))
            reached = {name: run.status[name] for name in ("step", "max_steps") if name in run.status}
            run.set_state("failed", error=error, **reached)
        print(error, flush=True)


def _one_of_several() -> None:
    """Tells torch which of the run's processes this is, where Slurm has started several."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # all are on one node, whose name need not resolve
