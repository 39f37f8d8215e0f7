"""The workflow of `hydra/launcher=slurm`: submits the missing jobs of a command line and prints how to follow them."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease
from omegaconf import DictConfig

from losslens.config.interpolations import describe_derived
from losslens.core.commands import format_command
from losslens.core.errors import InputError
from losslens.core.locks import file_lock, held
from losslens.scheduling.monitor import follow_jobs
from losslens.scheduling.plan import JobSpec, plan_job
from losslens.scheduling.record import SubmissionRecord, read_record
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import Cluster, JobState
from losslens.scheduling.slurm.intent import recover
from losslens.scheduling.slurm.submit import Submission, arrays_of, check
from losslens.scheduling.status import may_be_alive

_MAX_LINES = 50  # with more jobs only their counts are printed


def launch(script: Path, configs: Sequence[DictConfig], wait: bool, dry_run: bool) -> None:
    """Submits the jobs of a command line that are neither done nor in the queue.

    Args:
        script: The entry script.
        configs: Composed configuration of each job.
        wait: Wait until all jobs have ended, and exit with status 1 if one has failed.
        dry_run: Only print what would be submitted.

    Raises:
        InputError: Slurm is not available, a configuration is invalid, or Slurm rejects a job. Nothing is submitted.
    """
    specs = _distinct(plan_job(script, config) for config in configs)
    here = cluster.require_cluster()
    if script.stem in ("train", "rollout"):
        for line in dict.fromkeys(filter(None, map(describe_derived, configs))):
            print(line, flush=True)
    output_dir = Path(specs[0].config["output_dir"])
    if "%" in str(output_dir.absolute()):
        raise InputError(f"output_dir={output_dir}: the path must not contain %, which Slurm interprets in log paths")
    if dry_run:
        _dry_run(_plan(specs, here), here)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with _lock(output_dir) as lock:
        needs = [need for spec in specs for need in spec.needs]
        for job in recover(dict.fromkeys(spec.folder for spec in [*needs, *specs]), here):
            print(f"job {job}: recovered; the command that submitted it was interrupted", flush=True)
        plan = _plan(specs, here)
        with Submission(here, lock) as submission:
            for array in arrays_of(plan.first, {}, here):
                submission.submit(array)
            for array in arrays_of(plan.new, plan.dependencies(submission.jobs), here):
                submission.submit(array)
    _print_result(plan, submission.jobs)
    if wait:
        sys.exit(follow_jobs(specs))
    # A diverged run is not trained again, so the command has failed.
    if any(spec.run and spec.run.divergence for spec in specs):
        sys.exit(1)


@contextmanager
def _lock(output_dir: Path) -> Iterator[SoftFileLease]:
    """Prevents two concurrent commands from submitting the same jobs, also from two login nodes.

    Not every shared file system tells other hosts of a lock (`flock`), but each lets one of them create a file. Such a
    file outlives its process, and counts as long as that refreshes it. On one host, the lock of the kernel is surer.
    """
    with file_lock(output_dir / ".slurm.lock"):
        lease = SoftFileLease(output_dir / ".slurm.lease")
        with held(lease, lambda: f"Another host submits, or was interrupted; waiting for {lease.lock_file}"):
            yield lease


@dataclass(frozen=True)
class _Plan:
    """Plan for the jobs of a command line.

    Attributes:
        specs: All jobs.
        first: Dependencies to submit first, since they are neither done nor in the queue.
        new: Jobs to submit.
        skipped: Why other missing jobs are not submitted, by record: their run is locked by a process outside Slurm's
            queue, or Slurm does not know a job that was submitted a moment ago.
        queued: Slurm ids of pending and running jobs among `specs` and their dependencies, by record.
        inputs: Slurm ids of pending and running jobs whose results `new` reads, by record.
    """

    specs: list[JobSpec]
    first: list[JobSpec]
    new: list[JobSpec]
    skipped: dict[Path, str]
    queued: dict[Path, str]
    inputs: dict[Path, str]

    def dependencies(self, submitted: dict[Path, str]) -> dict[Path, str]:
        """The `--dependency` of each new job for sbatch, by record; empty for none."""
        jobs = {**self.queued, **submitted}
        result = {}
        for spec in self.new:
            needed = sorted({jobs[need.record] for need in spec.needs if need.record in jobs})
            # On whole arrays, since all jobs of an array belong to the same sweep.
            waited_for = sorted(
                {self.inputs[record].partition("_")[0] for record in spec.waits_for if record in self.inputs}
            )
            parts = [("afterok", needed), ("afterany", waited_for)]
            result[spec.record] = ",".join(":".join([kind, *ids]) for kind, ids in parts if ids)
        return result


def _plan(specs: list[JobSpec], here: Cluster) -> _Plan:
    """Determines which jobs are missing.

    Raises:
        InputError: Slurm cannot be queried, or would reject a job.
    """
    needs = _distinct(need for spec in specs for need in spec.needs)
    # A failed run may be submitted again at once, although its job may take a while to end.
    over = {spec.record for spec in specs if spec.done or (spec.run and spec.run.status.get("state") == "failed")}
    states = _states({spec.record for spec in [*needs, *specs]} - over, here)
    queued = _live(states)
    missing = [spec for spec in specs if not spec.done and spec.record not in queued]
    skipped = {spec.record: "locked by another process" for spec in missing if spec.run and spec.run.is_locked}
    for spec in [*needs, *missing]:
        record, state = states.get(spec.record, (None, None))
        if record is not None and state is None and may_be_alive(record, spec.run):
            skipped.setdefault(spec.record, f"Slurm does not know its job {record.job} yet; repeat the command soon")
    new = [spec for spec in missing if spec.record not in skipped]
    for need in needs:
        if need.record in skipped and any(need in spec.needs for spec in new):
            raise InputError(f"hydra/launcher=slurm: {need.name}: {skipped[need.record]}")
    first = [need for need in needs if need.record not in queued and any(need in spec.needs for spec in new)]
    check(arrays_of([*first, *new], {}, here))
    inputs = _live(_states({record for spec in new for record in spec.waits_for}, here))
    return _Plan(specs, first, new, skipped, queued, inputs)


def _distinct(specs: Iterable[JobSpec]) -> list[JobSpec]:
    """The jobs without duplicates, such as one run under two names of its learning rate."""
    by_key: dict[Path, JobSpec] = {}
    for spec in specs:
        by_key.setdefault(spec.key, spec)
    return list(by_key.values())


def _states(records: set[Path], here: Cluster) -> dict[Path, tuple[SubmissionRecord, JobState | None]]:
    """The records of jobs of this cluster, with the jobs' states; None for jobs that Slurm does not know."""
    submitted = {file: record for file in records if (record := read_record(file)) and record.cluster == here.name}
    states = cluster.job_states(submitted.values())
    if states is None:
        raise InputError("hydra/launcher=slurm: the Slurm queue cannot be queried (squeue failed); try again")
    return {file: (record, states.get(record)) for file, record in submitted.items()}


def _live(states: dict[Path, tuple[SubmissionRecord, JobState | None]]) -> dict[Path, str]:
    """Slurm ids of the jobs that are pending or running."""
    return {file: record.job for file, (record, state) in states.items() if state is not None and state.is_live}


def _dry_run(plan: _Plan, here: Cluster) -> None:
    _show(plan, dict.fromkeys([spec.record for spec in [*plan.first, *plan.new]], "would be submitted"))
    dependencies = plan.dependencies({spec.record: "ROLLOUTS" for spec in plan.first})
    arrays = [*arrays_of(plan.first, {}, here), *arrays_of(plan.new, dependencies, here)]
    for array in arrays:
        print(f"\n--- script for sbatch, {_jobs(len(array.specs))}:")
        print(array.batch_file(array.folder / "code-HASH"))
    total = len(plan.first) + len(plan.new)
    calls = "one call" if len(arrays) == 1 else f"{len(arrays)} calls"
    print(f"Dry run: nothing was submitted ({_jobs(total)} in {calls} of sbatch).")


def _print_result(plan: _Plan, submitted: dict[Path, str]) -> None:
    _show(plan, {record: f"submitted as {job}" for record, job in submitted.items()})
    arrays = sorted({job.partition("_")[0] for job in submitted.values()}, key=int)
    if arrays:
        print(f"Submitted {_jobs(len(submitted))} to Slurm ({', '.join(arrays)}).")
    first = plan.specs[0]
    output_dir = Path(first.config["output_dir"])
    live = [spec for spec in plan.specs if spec.record in {**plan.queued, **submitted}]
    if live:
        if first.run:
            print(f"Follow:  {format_command('launch/status.py', first.config['sweep'], output_dir, '--watch')}")
        record = read_record(live[0].record)
        assert record is not None
        print(f"Log:     tail -F {shlex.quote(record.log)}")
        # An array that was submitted earlier may also contain jobs of another command.
        own = arrays or sorted(plan.queued[spec.record] for spec in live)
        print(f"Cancel:  scancel {' '.join(own) if len(own) <= _MAX_LINES else '…'}")
        print("Run the same command again to submit only what is missing by then.", flush=True)
    if {spec.run.status.get("state") for spec in plan.specs if spec.run} == {"completed"}:
        print(f"Compare the weights:  {format_command('analyze.py', first.config['sweep'], output_dir)}")


def _show(plan: _Plan, texts: dict[Path, str]) -> None:
    """Prints one line per job, or for many jobs their number of each kind."""
    lines = {}
    for spec in [*plan.first, *plan.specs]:
        if spec.record in plan.skipped:
            default = f"skipped: {plan.skipped[spec.record]}"
        elif spec.record in plan.queued:
            default = f"in the queue as {plan.queued[spec.record]}"
        else:
            default = f"skipped: {spec.done}"
        lines[spec.name] = texts.get(spec.record, default)
    if len(lines) <= _MAX_LINES:
        width = max(map(len, lines), default=0)
        for name, text in lines.items():
            print(f"{name:<{width}}  {text}")
        return
    for text, number in Counter(text.partition(" as ")[0] for text in lines.values()).items():
        print(f"{_jobs(number)}: {text}")


def _jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"
