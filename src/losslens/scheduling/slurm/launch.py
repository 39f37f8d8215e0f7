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
    works = _distinct(plan_job(script, config) for config in configs)
    if script.stem in ("train", "rollout"):
        for line in dict.fromkeys(filter(None, map(describe_derived, configs))):
            print(line, flush=True)
    output_dir = Path(works[0].config["output_dir"])
    if "%" in str(output_dir.absolute()):
        raise InputError(f"output_dir={output_dir}: Slurm takes a % in the path of a log for its own")
    if dry_run:
        _dry_run(_plan(works, here), here)
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    # What two commands find missing at the same time is to be submitted once.
    with FileLock(output_dir / ".slurm.lock"):
        needs = [need for work in works for need in work.needs]
        for job in adopt(dict.fromkeys(work.folder for work in [*needs, *works]), here):
            print(f"job {job}: found again; the command that submitted it was cut off", flush=True)
        plan = _plan(works, here)
        with Submission(here) as submission:
            for array in arrays_of(plan.first, {}, here):
                submission.submit(array)
            for array in arrays_of(plan.new, plan.after(submission.jobs), here):
                submission.submit(array)
    _say_what_was_done(plan, submission.jobs)
    if wait:
        sys.exit(follow_jobs(works))
    # A diverged run is not trained again: the command cannot end well.
    if any(work.run and work.run.divergence for work in works):
        sys.exit(1)


@dataclass(frozen=True)
class _Plan:
    """What is to be done about the works of a command line.

    Attributes:
        works: All of them.
        first: What some of them need and nobody has made or is making.
        new: Those to submit.
        held: Tickets of those that a process trains which is not a job of theirs.
        queued: The Slurm jobs of those, and of what they need, that wait or run, by ticket.
        read: The same of what `new` reads.
    """

    works: list[JobSpec]
    first: list[JobSpec]
    new: list[JobSpec]
    held: set[Path]
    queued: dict[Path, str]
    read: dict[Path, str]

    def after(self, submitted: dict[Path, str]) -> dict[Path, str]:
        """The dependency of each new work, as sbatch takes it, by ticket; empty for none."""
        jobs = {**self.queued, **submitted}
        result = {}
        for work in self.new:
            needed = sorted({jobs[need.ticket] for need in work.needs if need.ticket in jobs})
            # Of an array as a whole: its jobs are of the same sweep.
            waited_for = sorted(
                {self.read[ticket].partition("_")[0] for ticket in work.waits_for if ticket in self.read}
            )
            parts = [("afterok", needed), ("afterany", waited_for)]
            result[work.ticket] = ",".join(":".join([kind, *ids]) for kind, ids in parts if ids)
        return result


def _plan(works: list[JobSpec], here: Cluster) -> _Plan:
    """Finds out what is missing.

    Raises:
        InputError: Slurm cannot be asked, or would not take it.
    """
    needs = _distinct(need for work in works for need in work.needs)
    # A job may take a while to end after its run has failed, and the run may be submitted again at once.
    over = {work.ticket for work in works if work.done or (work.run and work.run.status.get("state") == "failed")}
    queued = _live({work.ticket for work in [*needs, *works]} - over, here)
    missing = [work for work in works if not work.done and work.ticket not in queued]
    held = {work.ticket for work in missing if work.run and work.run.is_locked}
    new = [work for work in missing if work.ticket not in held]
    first = [need for need in needs if need.ticket not in queued and any(need in work.needs for work in new)]
    check(arrays_of([*first, *new], {}, here))
    return _Plan(works, first, new, held, queued, _live({ticket for work in new for ticket in work.waits_for}, here))


def _distinct(works: Iterable[JobSpec]) -> list[JobSpec]:
    """Works without those that make the same as one before: two names of one learning rate are one run."""
    found: dict[Path, JobSpec] = {}
    for work in works:
        found.setdefault(work.key, work)
    return list(found.values())


def _live(tickets: set[Path], here: Cluster) -> dict[Path, str]:
    """The Slurm job of each ticket whose job waits or runs."""
    held = {file: ticket for file in tickets if (ticket := read_record(file)) and ticket.cluster == here.name}
    told = cluster.job_states(ticket.job for ticket in held.values())
    if told is None:
        raise InputError("hydra/launcher=slurm: Slurm does not say what is in its queue; try again")
    return {file: ticket.job for file, ticket in held.items() if (job := told.get(ticket.job)) and job.is_live}


def _dry_run(plan: _Plan, here: Cluster) -> None:
    _show(plan, dict.fromkeys([work.ticket for work in [*plan.first, *plan.new]], "would be submitted"))
    after = plan.after({work.ticket: "ROLLOUTS" for work in plan.first})
    arrays = [*arrays_of(plan.first, {}, here), *arrays_of(plan.new, after, here)]
    for array in arrays:
        print(f"\n--- given to sbatch, for {_jobs(len(array.works))}:")
        print(array.batch_file(array.folder / "code-HASH"))
    total = len(plan.first) + len(plan.new)
    calls = "one call" if len(arrays) == 1 else f"{len(arrays)} calls"
    print(f"Nothing was submitted. It would be {_jobs(total)} in {calls} of sbatch.")


def _say_what_was_done(plan: _Plan, submitted: dict[Path, str]) -> None:
    _show(plan, {ticket: f"submitted as {job}" for ticket, job in submitted.items()})
    arrays = sorted({job.partition("_")[0] for job in submitted.values()}, key=int)
    if arrays:
        print(f"Submitted {_jobs(len(submitted))} to Slurm ({', '.join(arrays)}).")
    first = plan.works[0]
    output_dir = Path(first.config["output_dir"])
    live = [work for work in plan.works if work.ticket in {**plan.queued, **submitted}]
    if live:
        if first.run:
            print(f"Follow:  {format_command('launch/status.py', first.config['sweep'], output_dir, '--watch')}")
        ticket = read_record(live[0].ticket)
        assert ticket is not None
        print(f"A log:   tail -F {shlex.quote(ticket.log)}")
        # Of arrays that were submitted before, the others may be of another command.
        mine = arrays or sorted(plan.queued[work.ticket] for work in live)
        print(f"Cancel:  scancel {' '.join(mine) if len(mine) <= _SHOWN else '…'}")
        print("The same command again submits only what is missing then.", flush=True)
    if {work.run.status.get("state") for work in plan.works if work.run} == {"completed"}:
        print(f"Compare the weights:  {format_command('analyze.py', first.config['sweep'], output_dir)}")


def _show(plan: _Plan, texts: dict[Path, str]) -> None:
    """A line a job; of many only how many there are of each kind."""
    said = {}
    for work in [*plan.first, *plan.works]:
        other = f"in the queue as {plan.queued[work.ticket]}" if work.ticket in plan.queued else f"skipped: {work.done}"
        busy = "skipped: another process is at it" if work.ticket in plan.held else other
        said[work.name] = texts.get(work.ticket, busy)
    if len(said) <= _SHOWN:
        width = max(map(len, said), default=0)
        for name, text in said.items():
            print(f"{name:<{width}}  {text}")
        return
    for text, number in Counter(text.partition(" as ")[0] for text in said.values()).items():
        print(f"{_jobs(number)}: {text}")


def _jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"
