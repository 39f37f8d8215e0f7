"""What `hydra/launcher=slurm` does with a command line: submits what is missing, and says how to follow it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from losslens.slurm import cluster
from losslens.slurm.cluster import Cluster
from losslens.slurm.follow import follow
from losslens.slurm.submission import Submission, arrays_of, check
from losslens.slurm.ticket import read_ticket
from losslens.slurm.work import Work, work_of

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
    here = cluster.require()
    works = _distinct(work_of(script, config) for config in configs)
    needs = _distinct(need for work in works for need in work.needs)
    queued = _queued([*needs, *works], here)
    missing = [work for work in works if not work.done and work.ticket not in queued]
    held = {work.ticket for work in missing if work.run and work.run.is_held}
    new = [work for work in missing if work.ticket not in held]
    first = [need for need in needs if need.ticket not in queued and any(need in work.needs for work in new)]
    read = _jobs({ticket for work in new for ticket in work.waits_for}, here)
    # Before anything is written: would Slurm take all of it?
    check(arrays_of([*first, *new], {}, here))
    said = dict.fromkeys(held, "skipped: another process is at it")
    if dry_run:
        _show([*first, *works], said | {work.ticket: "would be submitted" for work in [*first, *new]}, queued)
        _dry_run(first, new, queued, read, here)
        return
    with Submission(here) as submission:
        for array in arrays_of(first, {}, here):
            submission.submit(array)
        jobs = {**queued, **submission.jobs}
        for array in arrays_of(new, {work.ticket: _after(work, jobs, read) for work in new}, here):
            submission.submit(array)
    jobs = {**queued, **submission.jobs}
    said |= {work.ticket: f"submitted as {jobs[work.ticket]}" for work in [*first, *new]}
    _show([*first, *works], said, queued)
    if submission.jobs:
        arrays = sorted({job.partition("_")[0] for job in submission.jobs.values()}, key=int)
        print(f"Submitted {_jobs_of(len(submission.jobs))} to Slurm ({', '.join(arrays)}).")
    if set(jobs) & {work.ticket for work in works}:
        _say_how_to_follow(works[0], sorted({job.partition("_")[0] for job in jobs.values()}, key=int))
    states = {work.run.status.get("state") for work in works if work.run}
    if states == {"completed"}:
        print(f"Compare the weights:  python analyze.py sweep={works[0].config['sweep']}")
    if wait:
        sys.exit(follow(works))
    # A diverged run is not trained again: the command cannot end well.
    if any(work.run and work.run.divergence for work in works):
        sys.exit(1)


def _distinct(works: Iterable[Work]) -> list[Work]:
    """Works without those that make the same as one before: two names of one learning rate are one run."""
    found: dict[Path, Work] = {}
    for work in works:
        found.setdefault(work.key, work)
    return list(found.values())


def _jobs(tickets: set[Path], here: Cluster) -> dict[Path, str]:
    """The Slurm job of each ticket whose job waits or runs."""
    held = {file: ticket for file in tickets if (ticket := read_ticket(file)) and ticket.cluster == here.name}
    told = cluster.states(ticket.job for ticket in held.values()) or {}
    return {file: ticket.job for file, ticket in held.items() if (job := told.get(ticket.job)) and job.is_live}


def _queued(works: list[Work], here: Cluster) -> dict[Path, str]:
    """The Slurm job of each work that is to be done and waits or runs there."""
    # A job may take a while to end after its run has failed, and the run may be submitted again at once.
    over = {work.ticket for work in works if work.done or (work.run and work.run.status.get("state") == "failed")}
    return _jobs({work.ticket for work in works} - over, here)


def _after(work: Work, jobs: dict[Path, str], read: dict[Path, str]) -> str:
    """The dependency of a job, as sbatch takes it."""
    needed = sorted({jobs[need.ticket] for need in work.needs if need.ticket in jobs})
    # Of an array as a whole: its jobs are of the same sweep.
    waited_for = sorted({read[ticket].partition("_")[0] for ticket in work.waits_for if ticket in read})
    parts = [("afterok", needed), ("afterany", waited_for)]
    return ",".join(":".join([kind, *ids]) for kind, ids in parts if ids)


def _dry_run(first: list[Work], new: list[Work], queued: dict[Path, str], read: dict[Path, str], here: Cluster) -> None:
    jobs = {**queued, **{work.ticket: "ROLLOUTS" for work in first}}
    arrays = arrays_of(first, {}, here)
    arrays += arrays_of(new, {work.ticket: _after(work, jobs, read) for work in new}, here)
    for array in arrays:
        print(f"\n--- given to sbatch, for {_jobs_of(len(array.works))}:")
        print(array.batch_file(array.folder / "code-HASH"))
    print(f"Nothing was submitted. It would be {_jobs_of(len(first) + len(new))} in {len(arrays)} calls of sbatch.")


def _jobs_of(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"


def _show(works: list[Work], texts: dict[Path, str], queued: dict[Path, str]) -> None:
    """A line a job; of many only how many there are of each kind."""
    said = {
        work.name: texts.get(work.ticket)
        or (f"in the queue as {queued[work.ticket]}" if work.ticket in queued else f"skipped: {work.done}")
        for work in works
    }
    if len(said) <= _SHOWN:
        width = max(map(len, said), default=0)
        for name, text in said.items():
            print(f"{name:<{width}}  {text}")
        return
    for text, number in Counter(text.partition(" as ")[0] for text in said.values()).items():
        print(f"{_jobs_of(number)}: {text}")


def _say_how_to_follow(work: Work, arrays: list[str]) -> None:
    if work.run:
        sweep = work.run.folder.parent
        folder = f" output_dir={sweep.parent}" if str(sweep.parent) != "outputs" else ""
        print(f"Follow:  python launch/status.py sweep={sweep.name}{folder} --watch")
    print(f"Logs:    tail -F {work.folder}/{arrays[-1]}*.out")
    print(f"Cancel:  scancel {' '.join(arrays)}")
    print("The same command again submits only what is missing then.", flush=True)
