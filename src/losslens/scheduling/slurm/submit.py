"""Sends work to Slurm through submitit: a few arrays, all of them or none."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit

from losslens.config.slurm import Resources
from losslens.core.errors import InputError, first_line
from losslens.core.files import atomic_file
from losslens.scheduling.code_snapshot import script_in, snapshot_code
from losslens.scheduling.plan import JobSpec
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import Cluster
from losslens.scheduling.slurm.intent import Intent, private
from losslens.scheduling.slurm.task import Task

# What submitit writes before sbatch has given an id; commands that share a folder take turns.
_OF_A_CALL = re.compile(r"[0-9a-f]{32}\.pkl|\.submission_file_[0-9a-f]{32}\.sh")


@dataclass(frozen=True)
class Array:
    """What one call of sbatch submits.

    Attributes:
        specs: One job each; all with the same script, resources and folder.
        after: The dependency, as sbatch takes it; empty for none.
    """

    specs: list[JobSpec]
    after: str

    @property
    def folder(self) -> Path:
        """Where its logs and pickles go."""
        return self.specs[0].folder.absolute()

    @property
    def processes(self) -> int:
        """How many processes each of its jobs has."""
        first = self.specs[0]
        return max(first.resources.gpus, 1) if first.script.stem == "train" else 1

    def executor(self, code: Path, intent: Intent) -> submitit.SlurmExecutor:
        """Submitit's executor for this array, whose jobs run the copy `code` of the code, and are those of `intent`."""
        first = self.specs[0]
        resources = first.resources
        executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=resources.requeues)
        python = shlex.quote(sys.executable)
        # submitit writes its own names with underscores, and what is set by hand is to take their place.
        extra = {name.replace("-", "_"): value for name, value in (resources.sbatch or {}).items()}
        # By its comment a job is found again, should this command be cut off before it has written down the job's id.
        comment = f"{extra.pop('comment', '')} {intent.comment}".strip()
        flags: dict[str, Any] = {"requeue": True, "chdir": str(Path.cwd()), **extra}
        if self.after:
            # What depends on rollouts that could not be made is to go, not to wait for ever.
            flags |= {"dependency": self.after, "kill-on-invalid-dep": "yes"}
        executor.update_parameters(
            job_name=f"losslens-{first.script.stem}",
            time=resources.minutes,
            ntasks_per_node=self.processes,
            cpus_per_task=resources.cpus,
            mem=f"{max(1, round(resources.memory_gb * 1024))}M",  # 0 would be all that the node has
            wckey=None,
            comment=comment,
            signal_delay_s=resources.signal_seconds,
            array_parallelism=resources.max_running,
            stderr_to_stdout=True,
            # A process that died would leave the others of its run waiting. The cores are not handed on by themselves.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
            setup=[
                *intent.setup,
                *resources.setup,
                # The same number of threads on whatever node a run goes on: it decides how sums are rounded.
                f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{resources.cpus}}}",
                # The code as it is now, before whatever the working directory holds when the job starts.
                "export PYTHONSAFEPATH=1",
                f"export PYTHONPATH={shlex.quote(f'{code}/src')}${{PYTHONPATH:+:$PYTHONPATH}}",
            ],
            teardown=[
                # This shell outlives a process that was killed, and can say so. Its exit status is the job's.
                "code=$?",
                f"[ $code -eq 0 ] || {python} -m losslens.scheduling.slurm.epilog "
                f"{shlex.quote(str(self.folder))} $code {resources.requeues}",
                "exit $code",
            ],
            additional_parameters=flags,
            **{
                name: value
                for name in ("partition", "account", "qos", "constraint")
                if (value := getattr(resources, name)) is not None
            },
            **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
        )
        return executor

    def batch_file(self, code: Path) -> str:
        """The script that sbatch is given."""
        executor = self.executor(code, Intent(self.folder, "ID"))
        if len(self.specs) > 1:
            executor.parameters["map_count"] = len(self.specs)
        return executor._make_submission_file_text(executor._submitit_command_str, "")


def arrays_of(specs: Iterable[JobSpec], after: dict[Path, str], here: Cluster) -> list[Array]:
    """Works in arrays, cut at the cluster's limit.

    Args:
        specs: What to submit.
        after: The dependency of each, by its record.
        here: The cluster.
    """
    groups: dict[tuple[str, ...], list[JobSpec]] = defaultdict(list)
    for spec in specs:
        key = (str(spec.script), str(spec.folder), spec.resources.model_dump_json(), after.get(spec.record, ""))
        groups[key].append(spec)
    return [
        Array(group[start : start + here.array_limit], key[-1])
        for key, group in groups.items()
        for start in range(0, len(group), here.array_limit)
    ]


def check(arrays: Iterable[Array]) -> None:
    """Asks Slurm whether it would take these arrays; nothing is submitted or written.

    Raises:
        InputError: It would not.
    """
    for array in arrays:
        text = array.batch_file(Path("code"))
        # A dependency on a job that is about to be submitted cannot be checked.
        text = re.sub(r"^#SBATCH --(dependency|kill-on-invalid-dep)=.*\n", "", text, flags=re.MULTILINE)
        with _clean_environment(array.specs[0].resources):
            outcome = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            raise InputError(f"{_said(outcome.stderr)} ({_asked(array)})")


class Submission:
    """All arrays of one command: where one of them is refused, those before it are taken back.

    As a context manager: what was submitted inside is cancelled when the block ends with an error, and its runs and
    records are as they were. Where Slurm cannot be asked whether it has a job, all that was submitted stays, for the
    next command to find.
    """

    def __init__(self, here: Cluster) -> None:
        self.here = here
        self.jobs: dict[Path, str] = {}
        self._arrays: list[str] = []
        self._intents: list[Intent] = []
        self._before: dict[Path, bytes | None] = {}
        self._submitted: list[Path] = []  # of what `_before` has, the files of specs whose submission is written down

    def __enter__(self) -> Submission:
        return self

    def submit(self, array: Array) -> None:
        """Submits an array, and writes the record of each of its specs.

        Raises:
            InputError: Slurm refuses it.
        """
        for spec in array.specs:
            self._queue(spec)
        private(array.folder)
        code = snapshot_code(array.specs[0].script, array.folder)
        tasks = [
            Task(code, script_in(code, spec.script), spec.config, spec.run.folder if spec.run else None)
            for spec in array.specs
        ]
        left_before = set(array.folder.iterdir())
        intent = Intent.new(array.folder)
        self._intents.append(intent)
        resources = array.specs[0].resources
        intent.write(
            self.here, [spec.record for spec in array.specs],
            [spec.run.name if spec.run else None for spec in array.specs], tasks, minutes=resources.minutes,
            requeues=resources.requeues, processes=array.processes,
        )  # fmt: skip
        self._submitted += [file for spec in array.specs for file in _files_of(spec)]
        try:
            with _clean_environment(resources):
                jobs = array.executor(code, intent).submit_array(tasks)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            intent.give_up()
            # The folder is that of running jobs too, whose logs and results appear meanwhile.
            for file in set(array.folder.iterdir()) - left_before:
                if _OF_A_CALL.fullmatch(file.name):
                    file.unlink(missing_ok=True)
            raise InputError(f"{_said(str(error))} ({_asked(array)})") from error
        self._arrays.append(jobs[0].job_id.partition("_")[0])
        intent.record([job.job_id for job in jobs])
        self.jobs |= {spec.record: job.job_id for spec, job in zip(array.specs, jobs, strict=True)}

    def _queue(self, spec: JobSpec) -> None:
        """Marks what is about to be submitted, before its job can start and say what it does."""
        for file in _files_of(spec):
            self._before[file] = file.read_bytes() if file.exists() else None
        # An old record would make whoever looks now believe that the new job has died.
        spec.record.unlink(missing_ok=True)
        if spec.run:
            status = spec.run.status
            spec.run.set_state("queued", **{name: status[name] for name in ("step", "max_steps") if name in status})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        stays = False
        for intent in self._intents:
            if intent.pending.exists() and intent.token.exists():  # sbatch may have answered, and nobody has heard it
                jobs = cluster.with_comment(intent.comment)
                stays |= jobs is None
                self._arrays += {job.partition("_")[0] for job in jobs or []}
        if stays:
            print("Slurm cannot be asked what has been submitted; the same command finds it again, or submits it")
            for file in self._submitted:
                self._before.pop(file, None)
        else:
            for intent in self._intents:
                intent.give_up()
            cluster.cancel(dict.fromkeys(self._arrays))
        for file, content in self._before.items():
            if content is None:
                file.unlink(missing_ok=True)
                if file.parent.is_dir() and not any(file.parent.iterdir()):
                    file.parent.rmdir()
            else:
                with atomic_file(file) as temporary:
                    temporary.write_bytes(content)


@contextmanager
def _clean_environment(resources: Resources) -> Iterator[None]:
    """Without what the environment would say to sbatch instead of the resources, and without the job it may be part of.

    The usual ways to name one's account and partition once and for all stay, where the resources name none.
    """
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    for name in ("account", "partition", "qos"):
        variable = f"SBATCH_{name.upper()}"
        if variable in os.environ and getattr(resources, name) is None:
            kept[variable] = os.environ[variable]
    with submitit.helpers.clean_env(extra_names=[name for name in os.environ if name.startswith("SALLOC_")]):
        os.environ.update(kept)
        yield


def _files_of(spec: JobSpec) -> list[Path]:
    """What says that a work is submitted."""
    return [spec.record, *([spec.run.folder / "status.json"] if spec.run else [])]


def _asked(array: Array) -> str:
    """What was asked for, as it is set."""
    given = array.specs[0].resources.model_dump(exclude={"requeues", "signal_seconds", "max_running", "setup"})
    return "resources: " + " ".join(f"{name}={value}" for name, value in given.items() if value not in (None, {}))


def _said(error: str) -> str:
    """What sbatch said of it."""
    lines = [line.partition("error:")[2].strip() for line in error.splitlines() if "sbatch: error:" in line]
    told = dict.fromkeys(
        re.sub(r"^(Batch job submission failed|allocation failure): ", "", line)
        for line in lines or [first_line(Exception(error))]
    )
    return f"Slurm refuses it: {'; '.join(told)}"
