"""Console script `losslens COMMAND …`. Each command is imported only when it is called."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

from losslens import __version__
from losslens.core.commands import call_as_installed
from losslens.core.redaction import guard_streams

# Commands with Hydra's command line; they exit the process themselves.
_JOBS = {
    "rollout": "samples, verifies and freezes the rollouts that every loss trains on",
    "train": "trains and scores one run per loss on the same rollouts, and scores the base",
    "evaluate": "scores finished runs on more benchmarks",
    "analyze": "compares the weight updates of a sweep; writes tables, figures and a report",
}
_TOOLS = {
    "compare": "compares adapters made anywhere: folders or hub ids, without training",
    "status": "shows the state of each run of a sweep, local or on Slurm",
    "sync": "uploads the W&B runs of a sweep that were logged offline",
    "dashboard": "creates a workspace and a report of a sweep on W&B",
    "migrate": "migrates runs of an earlier version of LossLens",
    "slurm": "starts a one-node Slurm for testing; submits a whole pipeline",
}


def main() -> int:
    """Runs a command and returns its exit status; 2 for an unknown command."""
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
        # For the user's own losses and problem sources. Appended, so that no file there shadows a package.
        sys.path.append("")
    command = import_module(f"losslens.cli.{name}")
    if name in _TOOLS:
        return int(command.main(arguments))
    sys.argv[:] = [f"losslens {name}", *arguments]  # Hydra parses the arguments from here
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
            "losslens COMMAND --help lists its options. Output goes to outputs/ in the current folder.",
        ]
    )


def _unknown(name: str) -> str:
    commands = [*_JOBS, *_TOOLS]
    close = get_close_matches(name.lower(), commands, 1)
    hint = f"did you mean losslens {close[0]}?" if close else f"it takes one of {', '.join(commands)}"
    if "=" in name or name == "-m":
        hint = "the command comes first, for example losslens train"
    return f"{name}: not a command; {hint} (losslens --help lists the commands)"


if __name__ == "__main__":
    sys.exit(main())
