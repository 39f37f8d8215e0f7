"""What a result came from: package versions, the commit of the code, the machine and the scheduler's job."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from losslens.core.commands import called, called_subcommand
from losslens.core.files import read_object

_PACKAGES = ("losslens", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "reasoning-gym", "numpy")
# In a copy of the code that was made for a job (`scheduling.code_snapshot`): what `code_version` gave at the original.
KEPT_CODE = "code.json"
# Not a scheduler's own program, which a job's command line is of.
_SCRIPTS = ("train.py", "analyze.py")
_SUBCOMMANDS = ("train", "analyze")
_SCHEDULER = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


# Environment variable with the path of the log of a job of losslens.scheduling.
JOB_LOG = "LOSSLENS_JOB_LOG"


def describe_environment() -> dict[str, Any]:
    """What a manifest says of where it was written."""
    return {"command": command_line(), "versions": versions(), "code": code_version(), "machine": machine()}


def command_line() -> str | None:
    """The command line that this process was started by; None where it is not one of the scripts."""
    if called_subcommand() in _SUBCOMMANDS:
        return shlex.join([*called(called_subcommand()).split(), *sys.argv[1:]])
    name = Path(sys.argv[0]).name
    return shlex.join(["python", name, *sys.argv[1:]]) if name in _SCRIPTS else None


def versions() -> dict[str, str]:
    """Python's version and those of the packages that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def slurm_job() -> dict[str, str]:
    """The Slurm job that this process belongs to: its id (`12_3` in an array), cluster and log; empty outside one."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    about = {"job": job, "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""), "log": os.environ.get(JOB_LOG, "")}
    return {name: value for name, value in about.items() if value}


@lru_cache(maxsize=1)
def code_version() -> dict[str, str | None]:
    """The commit of the checkout that losslens runs from, and what differs from it; None outside a checkout."""
    root = Path(__file__).parents[1]
    kept = root.parents[1] / KEPT_CODE
    if kept.exists():
        return read_object(kept)
    if root.parent.name != "src":  # installed, perhaps inside of another project's checkout
        return {"commit": None, "dirty_diff": None}
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty_diff": _git(root, "diff", "HEAD")}


def machine() -> dict[str, Any]:
    """Host, processor count and the scheduler's ids."""
    return {
        "host": platform.node(), "platform": platform.platform(), "cpus": os.cpu_count(),
        "scheduler": {name: os.environ[name] for name in _SCHEDULER if name in os.environ},
    }  # fmt: skip


def _git(root: Path, *arguments: str) -> str | None:
    try:
        outcome = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return outcome.stdout.strip()
