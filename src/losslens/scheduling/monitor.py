"""A live table of the runs of a sweep, local and on Slurm."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from losslens.core.terminal import Table
from losslens.runs.run import Run
from losslens.scheduling.plan import JobSpec
from losslens.scheduling.progress import accuracies, duration, seconds_left, short_labels, sweep_left
from losslens.scheduling.record import read_record
from losslens.scheduling.slurm import cluster
from losslens.scheduling.status import RunStatus, refresh_run_statuses

_POLL_SECONDS = 5.0  # one call of squeue each time, whatever the number of runs
_COLOURS = {"completed": "green", "running": "cyan", "failed": "red", "damaged": "red", "preempted": "yellow"}


def table(run_statuses: Sequence[RunStatus], title: str = "", devices: Mapping[Run, str] | None = None) -> Table:
    """Builds a table with one row per run: state, step, time left, speed, loss, accuracy, Slurm job, last error.

    The caption shows the remaining training time of all running and waiting runs.

    Args:
        run_statuses: The runs.
        title: Title of the table.
        devices: Devices of this machine that the runs are trained on; shown in place of their Slurm jobs.
    """
    runs = [each.run for each in run_statuses]
    labels, accuracy = short_labels(runs), accuracies(runs)
    left = sweep_left(run_statuses)
    rows = Table(title=title or None, title_justify="left", caption_justify="left")
    rows.caption = None if left is None else f"about {duration(left)} of training left"
    rows.add_column("run", overflow="fold")
    if labels:
        rows.add_column("settings", overflow="fold")
    rows.add_column("state", overflow="fold")
    for name in ("step", "left", "tokens/s", "loss", "accuracy"):
        rows.add_column(name, justify="right", overflow="fold")
    for name in ("Slurm" if devices is None else "device", "error"):
        rows.add_column(name, overflow="fold")
    for each in run_statuses:
        status = each.status
        seconds = seconds_left(status)
        rows.add_row(
            Text(each.run.name),
            *([Text(labels.get(each.run, ""))] if labels else []),
            Text(each.state, style=_COLOURS.get(each.state, "")),
            f"{status['step']}/{status['max_steps']}" if "step" in status else "",
            "" if seconds is None else duration(seconds),
            f"{status['tokens_per_second']:,.0f}" if "tokens_per_second" in status else "",
            f"{status['loss']:.4f}" if "loss" in status else "",
            f"{accuracy[each.run]:.1%}" if each.run in accuracy else "",
            Text(f"{each.job or ''} {each.slurm or ''}".strip() if devices is None else devices.get(each.run, "")),
            Text(str(status.get("error", ""))),
        )
    return rows


def watch(find: Callable[[], Sequence[RunStatus]], is_over: Callable[[Sequence[RunStatus]], bool], title: str) -> None:
    """Shows the table until `is_over`: updated in place on a terminal, otherwise as a line per change of state."""
    console = Console(soft_wrap=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                statuses = find()
                live.update(table(statuses, title), refresh=True)
                if is_over(statuses):
                    return
                time.sleep(_POLL_SECONDS)
    printed: dict[str, str] = {}
    while True:
        statuses = find()
        for each in statuses:
            # Slurm notices the end of a completed run a little later.
            state = each.state if each.state == "completed" else f"{each.state} {each.slurm or ''}".strip()
            if printed.get(each.run.name) != state:
                print(_line(each, state), flush=True)
                printed[each.run.name] = state
        if is_over(statuses):
            return
        time.sleep(_POLL_SECONDS)


def _line(run_status: RunStatus, state: str) -> str:
    """A line such as `sft-…: completed, accuracy 60.0%`."""
    line = f"{run_status.run.name}: {state} {run_status.status.get('error', '')}".rstrip()
    accuracy = accuracies([run_status.run]) if run_status.state == "completed" else {}
    return f"{line}, accuracy {accuracy[run_status.run]:.1%}" if accuracy else line


def follow_jobs(specs: Sequence[JobSpec]) -> int:
    """Waits until all jobs have ended; returns 0 if all of them succeeded, else 1."""
    runs = [spec.run for spec in specs if spec.run]
    if runs:
        watch(lambda: refresh_run_statuses(runs), lambda statuses: all(each.is_over for each in statuses), "")
    records = [spec.record for spec in specs if not spec.run and not spec.done]
    succeeded = _wait_for(records)
    return 0 if succeeded and all(each.state == "completed" for each in refresh_run_statuses(runs)) else 1


def _wait_for(records: Sequence[Path]) -> bool:
    """Waits for jobs that belong to no run; returns True if all succeeded, as far as Slurm knows."""
    jobs = {record for file in records if (record := read_record(file))}
    while True:
        states = cluster.job_states(jobs)
        if states is not None and not any(state.is_live for state in states.values()):
            return all(job not in states or states[job].name == "COMPLETED" for job in jobs)
        time.sleep(_POLL_SECONDS)
