"""`losslens slurm`: a one-node Slurm for testing, and a whole pipeline in one command."""

from __future__ import annotations

import os
import subprocess
import sys
from difflib import get_close_matches
from importlib.resources import files

from losslens.cli import pipeline
from losslens.core.commands import command_name
from losslens.core.redaction import guard_streams

_HELP = """usage: losslens slurm up|down|status [DIR]
       losslens slurm pipeline [key=value …]

  up        start a Slurm of one node here (if need be), and print the line to run:  eval "$(losslens slurm up)"
  down      cancel its jobs and stop its daemons; the logs stay
  status    sinfo and squeue; exit status 0 when it is up, 1 when it is not
  pipeline  rollouts, runs and analysis on Slurm, each waiting for what it reads

DIR holds all files of that Slurm (default: .local_slurm in the current folder). It needs slurm-wlm and munge.
A sweep alone: losslens train -m hydra/launcher=slurm method=sft,dpo"""
_LOCAL = ("up", "down", "status")


def main(arguments: list[str]) -> int:
    """Runs a subcommand and returns its exit status."""
    guard_streams()
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        print(_HELP)
        return 0
    if verb == "pipeline":
        return pipeline.main(rest)
    if verb not in _LOCAL:
        close = get_close_matches(verb, [*_LOCAL, "pipeline"], 1)
        hint = f"did you mean {close[0]}?" if close else f"it takes one of {', '.join(_LOCAL)}, pipeline"
        print(f"{command_name('slurm')}: {verb}: {hint}", file=sys.stderr)
        return 2
    script = str(files("losslens") / "scheduling" / "slurm" / "local_slurm.sh")
    environment = {**os.environ, "LOCAL_SLURM_NAME": command_name("slurm")}
    return subprocess.run(["bash", script, verb, *rest], env=environment, check=False).returncode
