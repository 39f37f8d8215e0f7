"""`losslens COMMAND …`: the commands by their names, from any folder. Each is imported when it is called."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from losslens import __version__
from losslens.core.commands import call_as_installed
from losslens.core.redaction import guard_streams

# Those with Hydra's command line; they end the process themselves.
_JOBS = {
    "rollout": "samples, verifies and freezes the rollouts that every loss trains on",
    "train": "trains one run a loss on the same rollouts, scores it, and scores the base",
    "evaluate": "scores finished runs on more benchmarks",
    "analyze": "compares the weight updates of a sweep, and writes its tables and report",
}
_TOOLS = {
    "status": "shows where the runs of a sweep stand, here and on Slurm",
    "sync": "sends the W&B runs of a sweep that were logged offline",
    "dashboard": "makes a workspace and a report of a sweep on W&B",
    "migrate": "takes over runs that an earlier LossLens made",
    "slurm": "tries a Slurm of one node here; submits rollouts, runs and analysis at once",
}


def main() -> int:
    """Runs the command that the command line names, and gives its exit status; 2 where there is none of that name."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"losslens {__version__}")
        return 0
    if name not in _JOBS | _TOOLS:
        guard_streams()
        print(f"losslens: {_unknown(name)}", file=sys.stderr)
        return 2
    call_as_installed(name)
    if not sys.flags.safe_path and "" not in sys.path:
        # For a loss or a problem set of one's own. Last: no file of that folder takes the place of a package.
        sys.path.append("")
    command = import_module(f"losslens.cli.{name}")
    if name in _TOOLS:
        return int(command.main(arguments))
    sys.argv[:] = [f"losslens {name}", *arguments]  # of which Hydra tells, and reads the rest
    command.main()
    return 0


def _help() -> str:
    commands = _JOBS | _TOOLS
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {what}" for name, what in commands.items()]
    return "\n".join(
        [
            "usage: losslens COMMAND [key=value …]",
            "",
            *lines,
            "",
            "losslens COMMAND --help says what each takes. Whatever is made goes below outputs/ in the current folder.",
        ]
    )


def _unknown(name: str) -> str:
    commands = [*_JOBS, *_TOOLS]
    close = get_close_matches(name.lower(), commands, 1)
    hint = f"did you mean losslens {close[0]}?" if close else f"it takes one of {', '.join(commands)}"
    if "=" in name or name == "-m":
        hint = "a command comes first: losslens train, say"
    return f"{name}: no command; {hint} (losslens --help says what each does)"


if __name__ == "__main__":
    sys.exit(main())
