"""One live table of the runs of a sweep, here and on Slurm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from losslens.core.terminal import Table
from losslens.scheduling.plan import JobSpec
from losslens.scheduling.progress import accuracies, duration, seconds_left, short_labels, sweep_left
from losslens.scheduling.record import read_record
from losslens.scheduling.slurm import cluster
from losslens.scheduling.status import RunStatus, run_statuses

_EVERY = 5.0  # seconds; squeue is asked once each time, whatever the number of runs
_COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "damaged": "red", "preempted": "yellow"}


def table(found: Sequence[RunStatus], title: str = "") -> Table:
    """A row a run: state, step, time left, tokens per second, loss, accuracy, Slurm's id and state, the last error.

    Below it stands how long the training of all that runs or waits will take.
    """
    runs = [each.run for each in found]
    apart, accuracy = short_labels(runs), accuracies(runs)
    left = sweep_left(found)
    rows = Table(title=title or None, title_justify="left", caption_justify="left")
    rows.caption = None if left is None else f"about {duration(left)} of training left"
    rows.add_column("run", overflow="fold")
    if apart:
        rows.add_column("what", overflow="fold")
    rows.add_column("state", overflow="fold")
    for name in ("step", "left", "tokens/s", "loss", "accuracy"):
        rows.add_column(name, justify="right", overflow="fold")
    for name in ("Slurm", "error"):
        rows.add_column(name, overflow="fold")
    for each in found:
        status = each.status
        seconds = seconds_left(status)
        rows.add_row(
            Text(each.run.name),
            *([Text(apart.get(each.run, ""))] if apart else []),
            Text(each.state, style=_COLOURS.get(each.state, "")),
            f"{status['step']}/{status['max_steps']}" if "step" in status else "",
            "" if seconds is None else duration(seconds),
            f"{status['tokens_per_second']:,.0f}" if "tokens_per_second" in status else "",
            f"{status['loss']:.4f}" if "loss" in status else "",
            f"{accuracy[each.run]:.1%}" if each.run in accuracy else "",
            Text(f"{each.job or ''} {each.slurm or ''}".strip()),
            Text(str(status.get("error", ""))),
        )
    return rows


def watch(find: Callable[[], Sequence[RunStatus]], is_over: Callable[[Sequence[RunStatus]], bool], title: str) -> None:
    """Shows the table, and again when it changes, until it is over; on a terminal in one place."""
    console = Console(soft_wrap=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                found = find()
                live.update(table(found, title), refresh=True)
                if is_over(found):
                    return
                time.sleep(_EVERY)
    said: dict[str, str] = {}
    while True:
        found = find()
        for each in found:
            # Slurm takes a moment longer to see that a run is completed.
            now = each.state if each.state == "completed" else f"{each.state} {each.slurm or ''}".strip()
            if said.get(each.run.name) != now:
                print(_line(each, now), flush=True)
                said[each.run.name] = now
        if is_over(found):
            return
        time.sleep(_EVERY)


def _line(run_status: RunStatus, state: str) -> str:
    """`sft-…: completed, accuracy 60.0%`."""
    said = f"{run_status.run.name}: {state} {run_status.status.get('error', '')}".rstrip()
    accuracy = accuracies([run_status.run]) if run_status.state == "completed" else {}
    return f"{said}, accuracy {accuracy[run_status.run]:.1%}" if accuracy else said


def follow_jobs(specs: Sequence[JobSpec]) -> int:
    """Waits for specs; 0 when all have ended well, else 1."""
    runs = [spec.run for spec in specs if spec.run]
    if runs:
        watch(lambda: run_statuses(runs), lambda found: all(each.is_over for each in found), "")
    records = [spec.record for spec in specs if not spec.run and not spec.done]
    ended_well = _wait_for(records)
    return 0 if ended_well and all(each.state == "completed" for each in run_statuses(runs)) else 1


def _wait_for(records: Sequence[Path]) -> bool:
    """Waits for jobs that are of no run; whether all have ended well, as far as Slurm knows."""
    jobs = {record.job for file in records if (record := read_record(file))}
    while True:
        told = cluster.job_states(jobs)
        if told is not None and not any(state.is_live for state in told.values()):
            return all(job not in told or told[job].name == "COMPLETED" for job in jobs)
        time.sleep(_EVERY)
