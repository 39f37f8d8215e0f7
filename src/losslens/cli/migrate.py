"""`losslens migrate`, `launch/migrate.py`: takes runs of an earlier LossLens over. Nothing is trained again."""

from __future__ import annotations

import sys
from pathlib import Path

from losslens.cli.key_values import KeyValueParser, tells_missing_extras
from losslens.core.commands import called
from losslens.core.errors import InputError
from losslens.core.extras import tell
from losslens.pipeline.migration import migrate, sweeps_of


@tells_missing_extras("launch/migrate.py")
def main(arguments: list[str]) -> int:
    """Prints what became of each run and gives the exit status: 0, 1 when some were left, 2 for bad input."""
    parser = KeyValueParser(
        {"output_dir": "outputs", "sweep": "", "losses": ""},
        "output_dir=outputs, sweep=all of them, losses=none (classes of one's own: mine.MyLoss,mine.Another)",
        prog=called("launch/migrate.py"),
        description="Renames the folders of runs that an earlier LossLens made, and writes their identities in today's "
        "form (docs/reference/identity.md), so that train, evaluate and analyze know them. Nothing is trained, scored "
        "or deleted; what was killed half-way is finished by the same command.",
        epilog="Exit status: 0 all runs are in today's form; 1 some were left as they are; 2 bad input.",
    )
    settings, _ = parser.parse(arguments)
    output_dir = Path(settings["output_dir"])
    losses = [name for name in settings["losses"].replace(" ", "").split(",") if name]
    if losses:
        sys.path.append(str(Path.cwd()))  # where the scripts find losses of one's own, too
    left = 0
    try:
        for sweep in [settings["sweep"]] if settings["sweep"] else sweeps_of(output_dir):
            found = migrate(output_dir, sweep, losses)
            for moved in found:
                left += bool(moved.left)
                print(f"{sweep}/{moved.run}: {f'left, {moved.left}' if moved.left else f'now {moved.name}'}")
            if any((output_dir / sweep).glob("analysis*")) and not all(moved.left for moved in found):
                again = f"{called('analyze.py')} sweep={sweep}"
                print(f"{sweep}: analyses name runs as they were called; {again} makes them anew")
    except InputError as error:
        print(tell(parser.prog, error), file=sys.stderr)
        return 2
    return 1 if left else 0
