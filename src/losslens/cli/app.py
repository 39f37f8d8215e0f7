"""Common frame of the commands that take a Hydra configuration: rollout, train, evaluate, analyze.

Exit status 0: done; 1: a failure while working; 2: invalid input, reported in one line on stderr without a traceback.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from losslens.cli.arguments import explain_rejection, flags_first, prepare_arguments
from losslens.config import interpolations
from losslens.config.analysis import AnalyzeConfig
from losslens.config.data import RolloutConfig
from losslens.config.evaluation import EvaluateConfig
from losslens.config.folders import conf_folder
from losslens.config.parse import resolved
from losslens.config.slurm import Job
from losslens.config.training import TrainConfig
from losslens.core import distributed
from losslens.core.commands import called_subcommand, command_name
from losslens.core.errors import InputError
from losslens.core.extras import require_extras
from losslens.core.jobs import Jobs, Tasks
from losslens.core.redaction import guard_streams, remember_address, remove_secrets

# Schema of each command's configuration.
_SCHEMAS: dict[str, type[Job]] = {
    "train": TrainConfig, "rollout": RolloutConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig,
}  # fmt: skip


def run(script: str, load: Callable[..., Tasks]) -> None:
    """Runs the jobs of the command line and exits.

    Args:
        script: Path of the entry script; `conf/<its name>.yaml` is its configuration.
        load: Called when the first job starts, so that `--help` does not wait for its imports; with
            `hydra/launcher=local`, with the devices of this machine to share the work out to.
    """
    guard_streams()
    path = Path(script).resolve()
    jobs = Jobs(path, load)
    if not distributed.is_main():
        # Only rank 0 prints.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    schema, name = _SCHEMAS[path.stem], command_name(path.name)
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
            return  # jobs of a swept experiment that differ only in options of train.py
        done.append(content)
        if schema is TrainConfig:
            jobs.say(interpolations.describe_derived(config))
        jobs.run(config)

    # For hydra/launcher=slurm, which runs the jobs elsewhere.
    job.script = path  # type: ignore[attr-defined]
    job.require_packages = partial(_require_packages, path.stem)  # type: ignore[attr-defined]
    # For hydra/launcher=local.
    job.share_out = lambda devices: setattr(jobs, "load", partial(load, devices))  # type: ignore[attr-defined]
    arguments = sys.argv[1:]
    _keep_secrets_from_hydra()
    # Makes Hydra raise its errors; otherwise it prints them over several lines and exits with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        conf = conf_folder()
        sys.argv[1:] = flags_first(prepare_arguments(arguments, name, schema, conf))
        _require_known_flags(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(conf), config_name=path.stem)(job)()
        status = jobs.end()
    except Exception as error:
        # Before the first job, only Hydra has run, so the error is about the command line.
        if jobs.started and not isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
            raise
        why = "" if jobs.started or isinstance(error, InputError) else explain_rejection(arguments, conf, schema)
        jobs.tell(InputError(why) if why else error)
        status = 2
    except KeyboardInterrupt:
        if distributed.is_main():
            print(f"{name}: interrupted; run the same command to resume", file=sys.stderr)
        status = 130
    # torchrun stops all processes when one fails, which would cut off the output of rank 0.
    sys.exit(status if distributed.is_main() else 0)


def _require_known_flags(arguments: list[str]) -> None:
    """Raises `InputError` for flags that Hydra's parser rejects; it would print its usage over several lines."""

    def refuse(message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")

    parser = get_args_parser()
    parser.error = refuse
    parser.parse_args(arguments)


def _keep_secrets_from_hydra() -> None:
    """Removes secrets from the command line and configuration that Hydra saves for a sweep."""
    save = OmegaConf.save

    def save_safely(config: Any, f: Any, resolve: bool = False) -> None:
        content = OmegaConf.to_container(config, resolve=resolve) if OmegaConf.is_config(config) else config
        for url in re.findall(r"https?://[^\s'\",\]}]+", str(content)):
            remember_address(url)
        save(OmegaConf.create(remove_secrets(content)), f)

    OmegaConf.save = staticmethod(save_safely)  # type: ignore[method-assign]


# Extras that every job of a command needs.
_EXTRAS = {"rollout": ("train",), "train": ("train",), "evaluate": ("train",), "analyze": ("train", "report")}


def _require_packages(command: str, config: DictConfig) -> None:
    """Raises `MissingExtraError` before a job starts if a package that it needs is not installed."""
    engines = [OmegaConf.select(config, key) for key in ("rollouts.engine", "evaluation.engine")]
    require_extras(*_EXTRAS[command], *["server"] * (not {"openai", "vllm"}.isdisjoint(engines)))
    if OmegaConf.select(config, "logger.name") == "wandb":
        require_extras("wandb", instead="logger=none")


def _require_one_gpu(config: DictConfig) -> None:
    """Raises `InputError` for several GPUs: one process cannot use them; Slurm or torchrun can provide them."""
    gpus = config.resources.gpus
    if isinstance(gpus, int) and gpus > 1 and distributed.world_size() == 1:
        subcommand = called_subcommand()
        program = ["-m", "losslens", subcommand] if subcommand else sys.argv[:1]
        line = shlex.join(["torchrun", f"--nproc_per_node={gpus}", *program, *sys.argv[1:]])
        raise InputError(f"resources.gpus={gpus} is for hydra/launcher=slurm; here: {line}")
