"""Provenance of a result: package versions, commit of the code, machine and scheduler job."""

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

from losslens.core.commands import called_subcommand, command_name
from losslens.core.files import read_object

_PACKAGES = ("losslens", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "reasoning-gym", "numpy")
# File in a job's copy of the code (`scheduling.code_snapshot`) with the `code_version` of the original.
CODE_FILE = "code.json"
# In a Slurm job the command line may be the scheduler's own program, which is not recorded.
_SCRIPTS = ("train.py", "analyze.py")
_SUBCOMMANDS = ("train", "analyze")
_SCHEDULER = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")
# Environment variable with the path of a submitted job's log.
JOB_LOG = "LOSSLENS_JOB_LOG"


def describe_environment() -> dict[str, Any]:
    """Collects a manifest's record of the environment: command line, versions, code and machine."""
    return {"command": command_line(), "versions": versions(), "code": code_version(), "machine": machine()}


def command_line() -> str | None:
    """Returns the command line of this process; None if it is not one of LossLens's commands."""
    if called_subcommand() in _SUBCOMMANDS:
        return shlex.join([*command_name(called_subcommand()).split(), *sys.argv[1:]])
    name = Path(sys.argv[0]).name
    return shlex.join(["python", name, *sys.argv[1:]]) if name in _SCRIPTS else None


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def slurm_job() -> dict[str, str]:
    """Returns id (`12_3` in an array), cluster and log of the Slurm job this process belongs to; empty outside one."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    fields = {"job": job, "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""), "log": os.environ.get(JOB_LOG, "")}
    return {name: value for name, value in fields.items() if value}


@lru_cache(maxsize=1)
def code_version() -> dict[str, str | None]:
    """Returns the commit of the checkout that losslens runs from, and the diff to it; None outside a checkout."""
    root = Path(__file__).parents[1]
    recorded = root.parents[1] / CODE_FILE
    if recorded.exists():
        return read_object(recorded)
    if root.parent.name != "src":  # installed, perhaps inside another project's checkout
        return {"commit": None, "dirty_diff": None}
    return {"commit": _git(root, "rev-parse", "HEAD"), "dirty_diff": _git(root, "diff", "HEAD")}


def machine() -> dict[str, Any]:
    """Returns the host, its platform and CPU count, and the scheduler's ids."""
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
