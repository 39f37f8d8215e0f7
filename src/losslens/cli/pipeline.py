"""`losslens slurm pipeline`, `launch/pipeline.sh`: rollouts, runs and analysis on Slurm in one command.

Each step waits for its input. Runs two commands, train and analyze, and passes on their output.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from losslens.core.commands import command_name

# Options that determine the runs' folder, and options passed to both commands.
_PLACES = ("experiment=", "sweep=", "output_dir=", "--config-dir=")
_SHARED = ("resources", "hydra.launcher", "--config-dir=")
_HELP = """Rollouts, runs and analysis on Slurm in one command; each waits for what it reads.

  {name} method=sft,rft,dft,rift,grpo,dpo resources.partition=gpu
  {name} experiment=lr_matched_dpo analyze.resources=cpu analyze.checkpoint=norm

Takes what `{train} -m` takes. resources…=, hydra.launcher…= and output_dir= are for the analysis too;
analyze.KEY=VALUE is for it alone. Again with the same line: submits the runs that are missing, and an analysis."""


def main(arguments: Sequence[str], scripts: bool = False) -> int:
    """Submits both commands and returns the exit status: that of train, unless the analysis cannot be submitted.

    Args:
        arguments: The command line without its name.
        scripts: Call train.py and analyze.py of the current folder instead of `losslens`.
    """
    if {"-h", "--help"} & set(arguments):
        name = "launch/pipeline.sh" if scripts else "losslens slurm pipeline"
        print(_HELP.format(name=name, train=command_name("train.py")))
        return 0

    arguments = _with_folders_joined(arguments)

    def line(script: str, *more: str) -> list[str]:
        return [sys.executable, *([f"{script}.py"] if scripts else ["-m", "losslens", script]), *more]

    def composed(key: str) -> str:
        asked = [*line("train"), *(each for each in arguments if each.startswith(_PLACES)), "--cfg", "job"]
        return subprocess.run([*asked, "--package", key], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    train = [each for each in arguments if not each.startswith("analyze.")]
    shared = [each for each in arguments if each.startswith(_SHARED)]
    own = [each.removeprefix("analyze.") for each in arguments if each.startswith("analyze.")]
    try:
        # An experiment may set the sweep.
        sweep, output_dir = composed("sweep"), composed("output_dir")
    except subprocess.CalledProcessError as error:
        return error.returncode
    # Status 1: a run diverged earlier or, with hydra.launcher.wait, failed. The others are analysed anyway.
    status = subprocess.run([*line("train", "-m", "hydra/launcher=slurm"), *train], check=False).returncode
    if not 0 <= status <= 1:
        return status
    if "hydra.launcher.dry_run=true" in arguments:
        print("An analysis would follow.")
        return status
    places = [f"sweep={sweep}", f"output_dir={output_dir}"]
    analysis = [*line("analyze", "hydra/launcher=slurm"), *places, *shared, *own]
    return subprocess.run(analysis, check=False).returncode or status


def _with_folders_joined(arguments: Sequence[str]) -> list[str]:
    """Joins `--config-dir DIR` into one argument."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in ("--config-dir", "-cd"):
            found[-1] = f"--config-dir={argument}"
        else:
            found.append(argument)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], scripts=True))
