"""Submission of job arrays to Slurm through submitit: all arrays of a command, or none."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from filelock import SoftFileLease

from losslens.config.slurm import Resources
from losslens.core.errors import InputError, first_line
from losslens.core.files import atomic_file
from losslens.scheduling.code_snapshot import script_in, snapshot_code
from losslens.scheduling.plan import JobSpec
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import Cluster
from losslens.scheduling.slurm.intent import Intent, deadline, make_private_folder, remove_temporary_files
from losslens.scheduling.slurm.task import Task

_TOO_MANY = re.compile(r"submit limit|SubmitJob", re.IGNORECASE)
# How sbatch says that it did not hear the controller's answer, which may have been an acceptance.
_UNANSWERED = re.compile(
    r"unable to contact|connect|timed out|communication|zero bytes|receive failure|make sense of", re.IGNORECASE
)


@dataclass(frozen=True)
class Array:
    """The jobs of one call of sbatch.

    Attributes:
        specs: The jobs; all have the same script, resources and folder.
        dependency: Value of sbatch's `--dependency`; empty for none.
    """

    specs: list[JobSpec]
    dependency: str

    @property
    def folder(self) -> Path:
        """Folder of its logs and pickles."""
        return self.specs[0].folder.absolute()

    @property
    def processes(self) -> int:
        """Number of processes per job."""
        first = self.specs[0]
        return max(first.resources.gpus, 1) if first.script.stem == "train" else 1

    def executor(self, code: Path, intent: Intent) -> submitit.SlurmExecutor:
        """Builds submitit's executor for this array.

        Args:
            code: Code snapshot that the jobs run.
            intent: The submission.
        """
        first = self.specs[0]
        resources = first.resources
        executor = submitit.SlurmExecutor(folder=self.folder, max_num_timeout=resources.requeues)
        python = shlex.quote(sys.executable)
        # With underscores, as in submitit's own parameters, so that the user's values replace them.
        extra = {name.replace("-", "_"): value for name, value in (resources.sbatch or {}).items()}
        # Identifies the jobs if this command is interrupted before it has recorded their ids.
        comment = f"{extra.pop('comment', '')} {intent.comment}".strip()
        flags: dict[str, Any] = {"requeue": True, "chdir": str(Path.cwd()), **extra}
        if self.dependency:
            # Cancel jobs whose rollouts failed; otherwise they would stay pending forever.
            flags |= {"dependency": self.dependency, "kill-on-invalid-dep": "yes"}
        executor.update_parameters(
            job_name=f"losslens-{first.script.stem}",
            time=resources.minutes,
            ntasks_per_node=self.processes,
            cpus_per_task=resources.cpus,
            mem=f"{max(1, round(resources.memory_gb * 1024))}M",  # 0 would request all memory of the node
            wckey=None,
            comment=comment,
            signal_delay_s=resources.signal_seconds,
            array_parallelism=resources.max_running,
            stderr_to_stdout=True,
            # A dead process would leave the others waiting. srun does not inherit --cpus-per-task from sbatch.
            srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={resources.cpus}"],
            setup=[
                *intent.setup,
                *resources.setup,
                # The same number of threads on every node a run resumes on, since it affects rounding.
                f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{resources.cpus}}}",
                # The code snapshot, and not the working directory, which may have changed.
                "export PYTHONSAFEPATH=1",
                f"export PYTHONPATH={shlex.quote(f'{code}/src')}${{PYTHONPATH:+:$PYTHONPATH}}",
            ],
            teardown=[
                # The shell outlives a killed process and can report it. Its exit status is the job's.
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
        """Returns the batch script for sbatch."""
        executor = self.executor(code, Intent(self.folder, "ID"))
        if len(self.specs) > 1:
            executor.parameters["map_count"] = len(self.specs)
        return executor._make_submission_file_text(executor._submitit_command_str, "")


def arrays_of(specs: Iterable[JobSpec], dependencies: dict[Path, str], here: Cluster) -> list[Array]:
    """Groups jobs into arrays, no larger than the cluster's limit.

    Args:
        specs: The jobs to submit.
        dependencies: Dependency of each job, by its record.
        here: The cluster.
    """
    groups: dict[tuple[str, ...], list[JobSpec]] = defaultdict(list)
    for spec in specs:
        dependency = dependencies.get(spec.record, "")
        groups[str(spec.script), str(spec.folder), spec.resources.model_dump_json(), dependency].append(spec)
    return [
        Array(group[start : start + here.array_limit], key[-1])
        for key, group in groups.items()
        for start in range(0, len(group), here.array_limit)
    ]


def check(arrays: Iterable[Array]) -> None:
    """Checks with `sbatch --test-only` that Slurm would accept these arrays; nothing is submitted or written.

    Raises:
        InputError: Slurm would reject an array.
    """
    for array in arrays:
        text = array.batch_file(Path("code"))
        # Dependencies on jobs that are not submitted yet cannot be checked.
        text = re.sub(r"^#SBATCH --(dependency|kill-on-invalid-dep)=.*\n", "", text, flags=re.MULTILINE)
        with _clean_environment(array.specs[0].resources):
            outcome = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            raise _error(outcome.stderr, array)


class Submission:
    """Submission of all arrays of a command: if one of them is rejected, the previous ones are cancelled.

    As a context manager: if the block raises, the jobs submitted in it are cancelled, and their runs and records are
    restored. If Slurm cannot be queried for a job, or does not cancel one, all submitted jobs are kept, for the next
    command to recover.

    Args:
        here: The cluster.
        lock: The lock that keeps other commands from submitting the same jobs, and can be lost to another host.
    """

    def __init__(self, here: Cluster, lock: SoftFileLease) -> None:
        self.here = here
        self._lock = lock
        self.jobs: dict[Path, str] = {}
        self._arrays: list[str] = []
        self._intents: list[Intent] = []
        self._previous: dict[Path, bytes | None] = {}  # content of changed files before; None if they did not exist
        self._submitted: list[Path] = []  # those of `_previous` whose jobs have a written submission

    def __enter__(self) -> Submission:
        return self

    def submit(self, array: Array) -> None:
        """Submits an array, and writes the record of each of its jobs.

        Raises:
            InputError: Slurm rejects it, or does not answer.
        """
        if not self._lock.is_lock_held_by_us:
            raise InputError(
                f"{self._lock.lock_file}: this command was suspended for long, and another submits now; repeat it"
            )
        for spec in array.specs:
            self._mark_queued(spec)
        make_private_folder(array.folder)
        code = snapshot_code(array.specs[0].script, array.folder)
        tasks = [
            Task(
                code,
                script_in(code, spec.script),
                spec.config,
                spec.run.folder if spec.run else None,
                spec.record.absolute(),
            )
            for spec in array.specs
        ]
        files_before = set(array.folder.iterdir())
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
            # submitit prints what sbatch says, which its error says again.
            with _clean_environment(resources), redirect_stderr(io.StringIO()):
                jobs = [job.job_id for job in array.executor(code, intent).submit_array(tasks)]
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            remove_temporary_files(array.folder, but=files_before)
            jobs = _accepted_all_the_same(array, intent, str(error))
            if not jobs:
                intent.give_up()
                raise _error(str(error), array) from error
        self._arrays.append(jobs[0].partition("_")[0])
        intent.record(jobs)
        self.jobs |= {spec.record: job for spec, job in zip(array.specs, jobs, strict=True)}

    def _mark_queued(self, spec: JobSpec) -> None:
        """Marks a run as queued before its job can start and change the status."""
        for file in _files_of(spec):
            self._previous[file] = file.read_bytes() if file.exists() else None
        # With the record of an old job, the run would look as if its new job had died.
        spec.record.unlink(missing_ok=True)
        if spec.run:
            remove_temporary_files(spec.run.folder)
            status = spec.run.status
            spec.run.set_state("queued", **{name: status[name] for name in ("step", "max_steps") if name in status})

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        is_unknown = False
        for intent in self._intents:
            if intent.pending.exists() and intent.token.exists():  # interrupted while sbatch was running
                jobs = cluster.jobs_with_comment(intent.comment)
                is_unknown |= jobs is None
                self._arrays += {job.partition("_")[0] for job in jobs or []}
        if is_unknown or not cluster.cancel(dict.fromkeys(self._arrays)):
            what = "be queried for" if is_unknown else "cancel all of"
            print(f"Slurm cannot {what} the submitted jobs; repeat the command to recover or submit them")
            for file in self._submitted:
                self._previous.pop(file, None)
        else:
            for intent in self._intents:
                intent.give_up()
        for file, content in self._previous.items():
            if content is None:
                file.unlink(missing_ok=True)
                if file.parent.is_dir() and not any(file.parent.iterdir()):
                    file.parent.rmdir()
            else:
                with atomic_file(file) as temporary:
                    temporary.write_bytes(content)


@contextmanager
def _clean_environment(resources: Resources) -> Iterator[None]:
    """Removes environment variables that would override the resources or describe an enclosing Slurm job.

    Keeps `SBATCH_ACCOUNT`, `SBATCH_PARTITION` and `SBATCH_QOS` if the resources do not set them.
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
    """Files that change when a job is submitted."""
    return [spec.record, *([spec.run.folder / "status.json"] if spec.run else [])]


def _describe_resources(array: Array) -> str:
    """The requested resources, for error messages."""
    requested = array.specs[0].resources.model_dump(exclude={"requeues", "signal_seconds", "max_running", "setup"})
    return "resources: " + " ".join(f"{name}={value}" for name, value in requested.items() if value not in (None, {}))


def _accepted_all_the_same(array: Array, intent: Intent, stderr: str) -> list[str]:
    """Looks for the jobs of an array that sbatch has failed to submit: the controller may only have answered too late.

    Raises:
        InputError: Slurm cannot be queried.
    """
    try:
        return intent.jobs(len(array.specs), until=deadline() if _UNANSWERED.search(stderr) else 0.0)
    except InputError as error:
        raise InputError(
            f"{_describe_error(stderr)}; whether the jobs were submitted cannot be told now: repeat the command"
        ) from error


def _error(stderr: str, array: Array) -> InputError:
    """The error of sbatch, with the request that led to it."""
    return InputError(f"{_describe_error(stderr)} ({_describe_resources(array)})")


def _describe_error(stderr: str) -> str:
    """The error of sbatch in one line."""
    lines = [line.partition("error:")[2].strip() for line in stderr.splitlines() if "sbatch: error:" in line]
    reasons = dict.fromkeys(
        re.sub(r"^(Batch job submission failed|allocation failure): ", "", line)
        for line in lines or [first_line(Exception(stderr))]
    )
    text = "; ".join(reasons)
    if _UNANSWERED.search(text):
        return f"Slurm does not answer: {text}"
    # Not of one job, but of how many the user may have submitted (MaxSubmitJobs of the account or the QOS).
    hint = "; submit fewer runs at a time, or more when these have ended" if _TOO_MANY.search(text) else ""
    return f"Slurm rejects the job: {text}{hint}"
