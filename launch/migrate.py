"""Takes runs of an earlier LossLens over: `python launch/migrate.py output_dir=outputs`. Nothing is trained again."""

from __future__ import annotations

import sys
from pathlib import Path

from losslens.cli.key_values import KeyValueParser
from losslens.core.errors import InputError
from losslens.pipeline.migration import migrate, sweeps_of


def main(arguments: list[str]) -> int:
    """Prints what became of each run and gives the exit status: 0, 1 when some were left, 2 for bad input."""
    parser = KeyValueParser(
        {"output_dir": "outputs", "sweep": "", "losses": ""},
        "output_dir=outputs, sweep=all of them, losses=none (classes of one's own: mine.MyLoss,mine.Another)",
        prog="migrate.py",
        description="Renames the folders of runs that an earlier LossLens made, and writes their identities in today's "
        "form (docs/reference/identity.md), so that train.py, evaluate.py and analyze.py know them. Nothing is "
        "trained, scored or deleted; what was killed half-way is finished by the same command.",
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
                print(f"{sweep}: analyses name runs as they were called; analyze.py sweep={sweep} makes them anew")
    except InputError as error:
        print(f"migrate.py: {error}", file=sys.stderr)
        return 2
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
