"""`losslens status`, `launch/status.py`: where the runs of a sweep stand, here and on Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from losslens.cli.key_values import KeyValueParser, tells_missing_extras
from losslens.core.commands import called
from losslens.core.errors import InputError
from losslens.core.extras import tell
from losslens.runs.run import runs_of
from losslens.scheduling.monitor import table, watch
from losslens.scheduling.status import RunStatus, run_statuses


@tells_missing_extras("launch/status.py")
def main(arguments: list[str]) -> int:
    """Prints the states and gives the exit status: 0 when all runs are completed, 1 when not, 2 for bad input."""
    parser = KeyValueParser(
        {"sweep": "main", "output_dir": "outputs"},
        "sweep=main, output_dir=outputs",
        prog=called("launch/status.py"),
        description="A row a run: state, step, time left, tokens per second, loss, accuracy on the first benchmark, "
        "Slurm's id and state where they are known, and the last error. Works wherever the folder can be read; what "
        "Slurm says is asked where there is one.",
        epilog="Exit status: 0 all runs are completed; 1 not yet, or one has failed; 2 bad input.",
    )
    parser.add_argument("--watch", action="store_true", help="stay, and show what changes, until nothing runs any more")
    settings, asked = parser.parse(arguments)
    output_dir, sweep = Path(settings["output_dir"]), settings["sweep"]

    def find() -> list[RunStatus]:
        return run_statuses(runs_of(output_dir, sweep))

    try:
        if asked.watch:
            watch(find, lambda found: all(each.is_over for each in found), f"sweep {sweep}")
        found = find()
    except InputError as error:
        print(tell(parser.prog, error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not asked.watch or not sys.stdout.isatty():
        # What is piped or kept is not cut to the width of a terminal.
        Console(width=None if sys.stdout.isatty() else 240).print(table(found))
    if any(each.job and not each.is_known and not each.is_over for each in found):
        print(f"{parser.prog}: what Slurm says is not known here; this is what the folder says", file=sys.stderr)
    return 0 if found and all(each.state == "completed" for each in found) else 1
