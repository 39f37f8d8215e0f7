"""`losslens migrate`, `launch/migrate.py`: migrates runs of an earlier version of LossLens."""

from __future__ import annotations

import sys
from pathlib import Path

from losslens.cli.key_values import KeyValueParser, tells_missing_extras
from losslens.core.commands import command_name
from losslens.core.errors import InputError
from losslens.core.extras import format_error
from losslens.pipeline.migration import migrate, sweeps_of


@tells_missing_extras("launch/migrate.py")
def main(arguments: list[str]) -> int:
    """Prints each outcome and returns the exit status: 0, 1 if some runs were not migrated, 2 for invalid input."""
    parser = KeyValueParser(
        {"output_dir": "outputs", "sweep": "", "losses": ""},
        "output_dir=outputs, sweep=all of them, losses=none (your own classes: mine.MyLoss,mine.Another)",
        prog=command_name("launch/migrate.py"),
        description="Renames the folders of runs of an earlier version of LossLens and rewrites their identities "
        "(docs/reference/identity.md), so that train, evaluate and analyze recognise them. Nothing is trained, scored "
        "or deleted; if interrupted, run the same command again.",
        epilog="Exit status: 0 all runs are in the current format; 1 some were not migrated; 2 invalid input.",
    )
    settings, _ = parser.parse(arguments)
    output_dir = Path(settings["output_dir"])
    losses = [name for name in settings["losses"].replace(" ", "").split(",") if name]
    if losses:
        sys.path.append(str(Path.cwd()))  # so that the user's losses can be imported
    left = 0
    try:
        for sweep in [settings["sweep"]] if settings["sweep"] else sweeps_of(output_dir):
            found = migrate(output_dir, sweep, losses)
            for moved in found:
                left += bool(moved.left)
                print(f"{sweep}/{moved.run}: {f'not migrated: {moved.left}' if moved.left else f'now {moved.name}'}")
            if any((output_dir / sweep).glob("analysis*")) and not all(moved.left for moved in found):
                again = f"{command_name('analyze.py')} sweep={sweep}"
                print(f"{sweep}: existing analyses use the old run names; run {again} to update them")
    except InputError as error:
        print(format_error(parser.prog, error), file=sys.stderr)
        return 2
    return 1 if left else 0
