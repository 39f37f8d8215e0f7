"""The entry scripts' shared frame: Hydra composes, one call works, and the exit status tells how it ended.

0: done. 1: a failure while working. 2: bad input, told in one line on stderr without a traceback.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from losslens.cli.arguments import explained, flags_first, prepared
from losslens.config import interpolations
from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.folders import conf_folder
from losslens.config.parse import resolved
from losslens.config.slurm import Job
from losslens.config.training import TrainConfig
from losslens.core import distributed
from losslens.core.commands import called, called_subcommand
from losslens.core.errors import InputError
from losslens.core.extras import require_extras
from losslens.core.jobs import Jobs, Tasks
from losslens.core.redaction import guard_streams, remember_address, without_secrets

# What each entry script reads of its configuration.
_SCHEMAS: dict[str, type[Job]] = {
    "train": TrainConfig, "rollout": RolloutConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig,
}  # fmt: skip


def run(script: str, load: Callable[[], Tasks]) -> None:
    """Runs the jobs that the command line asks for, and exits.

    Args:
        script: Path of the entry script; `conf/<its name>.yaml` is its configuration.
        load: Called when the first job starts, so that `--help` does not wait for its imports.
    """
    guard_streams()
    path = Path(script).resolve()
    jobs = Jobs(path, load)
    if not distributed.is_main():
        # Of several processes that train together the main one speaks for all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    schema, name = _SCHEMAS[path.stem], called(path.name)
    done: list[dict[str, Any]] = []

    def job(config: DictConfig) -> None:
        try:
            _require_packages(path.stem, config)
            _require_one_gpu(config)
            content = {} if schema is TrainConfig else resolved(schema, config)
        except InputError as error:
            jobs.tell(error)
            return
        if content and content in done:
            return  # a sweep of an experiment whose jobs differ for train.py only
        done.append(content)
        if schema is TrainConfig:
            jobs.say(interpolations.describe_derived(config))
        jobs.run(config)

    # For hydra/launcher=slurm, which runs none of them here.
    job.script = path  # type: ignore[attr-defined]
    job.require_packages = partial(_require_packages, path.stem)  # type: ignore[attr-defined]
    arguments = sys.argv[1:]
    _keep_secrets_from_hydra()
    # With this Hydra raises what it would otherwise print, several lines long, before it exits with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        conf = conf_folder()
        sys.argv[1:] = flags_first(prepared(arguments, name, schema, conf))
        hydra.main(version_base="1.3", config_path=str(conf), config_name=path.stem)(job)()
        status = jobs.end()
    except Exception as error:
        # Before the first job nothing is at work but Hydra, on what the user wrote.
        if jobs.started and not isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
            raise
        why = "" if jobs.started or isinstance(error, InputError) else explained(arguments, conf, schema)
        jobs.tell(InputError(why) if why else error)
        status = 2
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"{name}: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        status = 130
    # A launcher ends all processes when one ends with a failure, and would cut off what the main one still says.
    sys.exit(status if distributed.is_main() else 0)


def _keep_secrets_from_hydra() -> None:
    """Has Hydra write a sweep's command line and configuration without secrets; it has no setting for that file."""
    save = OmegaConf.save

    def save_safely(config: Any, f: Any, resolve: bool = False) -> None:
        content = OmegaConf.to_container(config, resolve=resolve) if OmegaConf.is_config(config) else config
        for url in re.findall(r"https?://[^\s'\",\]}]+", str(content)):
            remember_address(url)
        save(OmegaConf.create(without_secrets(content)), f)

    OmegaConf.save = staticmethod(save_safely)  # type: ignore[method-assign]


# The extras that a job of each command needs, whatever its configuration.
_EXTRAS = {"rollout": ("train",), "train": ("train",), "evaluate": ("train",), "analyze": ("train", "report")}


def _require_packages(command: str, config: DictConfig) -> None:
    """Refuses a job before it begins when a package that it will need is not installed."""
    engines = [OmegaConf.select(config, key) for key in ("rollouts.engine", "evaluation.engine")]
    require_extras(*_EXTRAS[command], *["server"] * ("openai" in engines))
    if OmegaConf.select(config, "logger.name") == "wandb":
        require_extras("wandb", instead="logger=none")


def _require_one_gpu(config: DictConfig) -> None:
    """Refuses several GPUs, which one process cannot use: only Slurm, or torchrun, can give them."""
    gpus = config.resources.gpus
    if isinstance(gpus, int) and gpus > 1 and distributed.world_size() == 1:
        subcommand = called_subcommand()
        program = ["-m", "losslens", subcommand] if subcommand else sys.argv[:1]
        line = shlex.join(["torchrun", f"--nproc_per_node={gpus}", *program, *sys.argv[1:]])
        raise InputError(f"resources.gpus={gpus} is for hydra/launcher=slurm; here: {line}")
