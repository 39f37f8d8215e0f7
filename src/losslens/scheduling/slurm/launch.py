"""What `hydra/launcher=slurm` does with a command line: submits what is missing, and says how to follow it."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from omegaconf import DictConfig

from losslens.config.interpolations import describe_derived
from losslens.core.commands import format_command
from losslens.core.errors import InputError
from losslens.scheduling.monitor import follow_jobs
from losslens.scheduling.plan import JobSpec, plan_job
from losslens.scheduling.record import read_record
from losslens.scheduling.slurm import cluster
from losslens.scheduling.slurm.cluster import Cluster
from losslens.scheduling.slurm.intent import adopt
from losslens.scheduling.slurm.submit import Submission, arrays_of, check

_SHOWN = 50  # jobs that get a line each


def launch(script: Path, configs: Sequence[DictConfig], wait: bool, dry_run: bool) -> None:
    """Submits the jobs of a command line that are neither done nor in the queue.

    Args:
        script: The entry script.
        configs: The composed configuration of each job.
        wait: Whether to stay until all have ended; then this exits with status 1 if one has failed.
        dry_run: Whether to say only what would be submitted.

    Raises:
        InputError: There is no Slurm here, a configuration is wrong, or Slurm refuses a job. Nothing is submitted then.
    """
    here = cluster.require_cluster()
    specs = _distinct(plan_job(script, config) for config in configs)
    if script.stem in ("train", "rollout"):
        for line in dict.fromkeys(filter(None, map(describe_derived, configs))):
            print(line, flush=True)
    output_dir = Path(specs[0].config["output_dir"])
    if "%" in str(output_dir.absolute()):
        raise InputError(f"output_dir={output_dir}: Slurm takes a % in the path of a log for its own")
    if dry_run:
        _dry_run(_plan(specs, here), here)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    # What two commands find missing at the same time is to be submitted once.
    with FileLock(output_dir / ".slurm.lock"):
        needs = [need for spec in specs for need in spec.needs]
        for job in adopt(dict.fromkeys(spec.folder for spec in [*needs, *specs]), here):
            print(f"job {job}: found again; the command that submitted it was cut off", flush=True)
        plan = _plan(specs, here)
        with Submission(here) as submission:
            for array in arrays_of(plan.first, {}, here):
                submission.submit(array)
            for array in arrays_of(plan.new, plan.after(submission.jobs), here):
                submission.submit(array)
    _say_what_was_done(plan, submission.jobs)
    if wait:
        sys.exit(follow_jobs(specs))
    # A diverged run is not trained again: the command cannot end well.
    if any(spec.run and spec.run.divergence for spec in specs):
        sys.exit(1)


@dataclass(frozen=True)
class _Plan:
    """What is to be done about the specs of a command line.

    Attributes:
        specs: All of them.
        first: What some of them need and nobody has made or is making.
        new: Those to submit.
        held: Tickets of those that a process trains which is not a job of theirs.
        queued: The Slurm jobs of those, and of what they need, that wait or run, by record.
        read: The same of what `new` reads.
    """

    specs: list[JobSpec]
    first: list[JobSpec]
    new: list[JobSpec]
    held: set[Path]
    queued: dict[Path, str]
    read: dict[Path, str]

    def after(self, submitted: dict[Path, str]) -> dict[Path, str]:
        """The dependency of each new job, as sbatch takes it, by record; empty for none."""
        jobs = {**self.queued, **submitted}
        result = {}
        for spec in self.new:
            needed = sorted({jobs[need.record] for need in spec.needs if need.record in jobs})
            # Of an array as a whole: its jobs are of the same sweep.
            waited_for = sorted(
                {self.read[record].partition("_")[0] for record in spec.waits_for if record in self.read}
            )
            parts = [("afterok", needed), ("afterany", waited_for)]
            result[spec.record] = ",".join(":".join([kind, *ids]) for kind, ids in parts if ids)
        return result


def _plan(specs: list[JobSpec], here: Cluster) -> _Plan:
    """Finds out what is missing.

    Raises:
        InputError: Slurm cannot be asked, or would not take it.
    """
    needs = _distinct(need for spec in specs for need in spec.needs)
    # A job may take a while to end after its run has failed, and the run may be submitted again at once.
    over = {spec.record for spec in specs if spec.done or (spec.run and spec.run.status.get("state") == "failed")}
    queued = _live({spec.record for spec in [*needs, *specs]} - over, here)
    missing = [spec for spec in specs if not spec.done and spec.record not in queued]
    held = {spec.record for spec in missing if spec.run and spec.run.is_locked}
    new = [spec for spec in missing if spec.record not in held]
    first = [need for need in needs if need.record not in queued and any(need in spec.needs for spec in new)]
    check(arrays_of([*first, *new], {}, here))
    return _Plan(specs, first, new, held, queued, _live({record for spec in new for record in spec.waits_for}, here))


def _distinct(specs: Iterable[JobSpec]) -> list[JobSpec]:
    """Works without those that make the same as one before: two names of one learning rate are one run."""
    found: dict[Path, JobSpec] = {}
    for spec in specs:
        found.setdefault(spec.key, spec)
    return list(found.values())


def _live(records: set[Path], here: Cluster) -> dict[Path, str]:
    """The Slurm job of each record whose job waits or runs."""
    held = {file: record for file in records if (record := read_record(file)) and record.cluster == here.name}
    told = cluster.job_states(record.job for record in held.values())
    if told is None:
        raise InputError("hydra/launcher=slurm: Slurm does not say what is in its queue; try again")
    return {file: record.job for file, record in held.items() if (job := told.get(record.job)) and job.is_live}


def _dry_run(plan: _Plan, here: Cluster) -> None:
    _show(plan, dict.fromkeys([spec.record for spec in [*plan.first, *plan.new]], "would be submitted"))
    after = plan.after({spec.record: "ROLLOUTS" for spec in plan.first})
    arrays = [*arrays_of(plan.first, {}, here), *arrays_of(plan.new, after, here)]
    for array in arrays:
        print(f"\n--- given to sbatch, for {_jobs(len(array.specs))}:")
        print(array.batch_file(array.folder / "code-HASH"))
    total = len(plan.first) + len(plan.new)
    calls = "one call" if len(arrays) == 1 else f"{len(arrays)} calls"
    print(f"Nothing was submitted. It would be {_jobs(total)} in {calls} of sbatch.")


def _say_what_was_done(plan: _Plan, submitted: dict[Path, str]) -> None:
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
        print(f"A log:   tail -F {shlex.quote(record.log)}")
        # Of arrays that were submitted before, the others may be of another command.
        mine = arrays or sorted(plan.queued[spec.record] for spec in live)
        print(f"Cancel:  scancel {' '.join(mine) if len(mine) <= _SHOWN else '…'}")
        print("The same command again submits only what is missing then.", flush=True)
    if {spec.run.status.get("state") for spec in plan.specs if spec.run} == {"completed"}:
        print(f"Compare the weights:  {format_command('analyze.py', first.config['sweep'], output_dir)}")


def _show(plan: _Plan, texts: dict[Path, str]) -> None:
    """A line a job; of many only how many there are of each kind."""
    said = {}
    for spec in [*plan.first, *plan.specs]:
        other = f"in the queue as {plan.queued[spec.record]}" if spec.record in plan.queued else f"skipped: {spec.done}"
        busy = "skipped: another process is at it" if spec.record in plan.held else other
        said[spec.name] = texts.get(spec.record, busy)
    if len(said) <= _SHOWN:
        width = max(map(len, said), default=0)
        for name, text in said.items():
            print(f"{name:<{width}}  {text}")
        return
    for text, number in Counter(text.partition(" as ")[0] for text in said.values()).items():
        print(f"{_jobs(number)}: {text}")


def _jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"
