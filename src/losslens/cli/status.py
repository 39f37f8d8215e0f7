"""`losslens status`, `launch/status.py`: the state of each run of a sweep, local or on Slurm."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from losslens.cli.key_values import KeyValueParser, tells_missing_extras
from losslens.core.commands import command_name
from losslens.core.errors import InputError
from losslens.core.extras import format_error
from losslens.runs.run import runs_of
from losslens.scheduling.monitor import table, watch
from losslens.scheduling.status import RunStatus, refresh_run_statuses


@tells_missing_extras("launch/status.py")
def main(arguments: list[str]) -> int:
    """Prints the states and returns the exit status: 0 if all runs are completed, 1 if not, 2 for invalid input."""
    parser = KeyValueParser(
        {"sweep": "main", "output_dir": "outputs"},
        "sweep=main, output_dir=outputs",
        prog=command_name("launch/status.py"),
        description="One row per run: state, step, time left, tokens per second, loss, accuracy on the first "
        "benchmark, Slurm job id and state if known, and the last error. Works wherever the folder can be read; Slurm "
        "is queried if it is available.",
        epilog="Exit status: 0 all runs completed; 1 not yet, or a run failed; 2 invalid input.",
    )
    parser.add_argument("--watch", action="store_true", help="keep updating until no run is active")
    settings, asked = parser.parse(arguments)
    output_dir, sweep = Path(settings["output_dir"]), settings["sweep"]

    def find() -> list[RunStatus]:
        return refresh_run_statuses(runs_of(output_dir, sweep))

    try:
        if asked.watch:
            watch(find, lambda found: all(each.is_over for each in found), f"sweep {sweep}")
        found = find()
    except InputError as error:
        print(format_error(parser.prog, error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if not asked.watch or not sys.stdout.isatty():
        # Piped output is not truncated to the width of a terminal.
        Console(width=None if sys.stdout.isatty() else 240).print(table(found))
    if any(each.job and not each.is_known and not each.is_over for each in found):
        why = "Slurm cannot be queried here, or does not know jobs of a moment ago"
        print(f"{parser.prog}: {why}; states are those in the folder", file=sys.stderr)
    if any((output_dir / sweep / "slurm").glob("submission-*/")):
        print(f"{parser.prog}: a submission was interrupted, or goes on; repeating it is safe", file=sys.stderr)
    return 0 if found and all(each.state == "completed" for each in found) else 1
