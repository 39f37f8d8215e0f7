"""The live table of the runs that are trained on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from losslens.runs.run import Run
from losslens.scheduling.monitor import table
from losslens.scheduling.status import refresh_run_statuses

_MAX_ROWS = 30  # of more runs only those that are trained now are shown

# Takes a line, and True for one on stderr.
Say = Callable[[str, bool], None]
# Takes the runs that were started, the devices of those that are trained now, and a title.
Update = Callable[[Sequence[Run], Mapping[Run, str], str], None]


def printer() -> Say:
    """Returns a function that prints lines, those on stdout only once: all workers load the same base and rollouts."""
    printed = set()

    def say(line: str, is_error: bool) -> None:
        if is_error or line not in printed:
            print(line, file=sys.stderr if is_error else sys.stdout, flush=True)
            printed.add(line)

    return say


@contextmanager
def live_table() -> Iterator[Update]:
    """Yields a function that updates the table; without a terminal it does nothing.

    What is printed meanwhile appears above the table.
    """
    console = Console()
    if not console.is_terminal:
        yield lambda runs, devices, title: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def update(runs: Sequence[Run], devices: Mapping[Run, str], title: str) -> None:
            shown = runs if len(runs) <= _MAX_ROWS else list(devices)
            live.update(table(refresh_run_statuses(shown), title, devices), refresh=True)

        yield update
