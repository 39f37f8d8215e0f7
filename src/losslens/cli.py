"""The entry scripts' shared frame: Hydra composes, one call works, and the exit status tells how it ended.

0: done. 1: a failure while working. 2: bad input, told in one line on stderr without a traceback.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from losslens import interpolations, processes
from losslens.command_line import explained, prepared
from losslens.config import AnalyzeConfig, EvaluateConfig, Job, RolloutConfig, TrainConfig, resolved
from losslens.errors import InputError, ServerError
from losslens.redaction import guard_streams, redacted, remember_address

# Importing torch, transformers and PEFT makes so many objects that the collector takes a quarter of the time.
gc.set_threshold(10_000)
# Set before any library reads them. TRL tells its makers about every trainer otherwise.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not sys.stderr.isatty():
    # A log needs no picture of each step.
    os.environ.setdefault("TQDM_MININTERVAL", "10")
# Hydra shows what libraries log; these log every request, and every glyph.
for _client in ("httpx", "httpx2", "openai", "fontTools"):
    logging.getLogger(_client).setLevel(logging.WARNING)
# TRL and PEFT still ask transformers by the old name.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
# GPT-2 stores a weight the other way round, which PEFT sees by itself.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning, module=r"peft\.")
# transformers aligns the configuration with the tokenizer, as it should; adapters do not hold it.
logging.getLogger("transformers.trainer_utils").addFilter(lambda said: "new PAD/BOS/EOS tokens" not in str(said.msg))

# What does one job, and what is called after the last one and gives the exit status.
Tasks = tuple[Callable[[DictConfig], None], Callable[[], int]]

# What each entry script reads of its configuration.
_SCHEMAS: dict[str, type[Job]] = {
    "train": TrainConfig, "rollout": RolloutConfig, "evaluate": EvaluateConfig, "analyze": AnalyzeConfig,
}  # fmt: skip


class Jobs:
    """The jobs of an entry script in one process, and how they ended.

    Args:
        script: Path of the entry script.
        load: Called when the first job starts, so that `--help` does not wait for its imports.
    """

    def __init__(self, script: Path, load: Callable[[], Tasks]) -> None:
        self.script = script
        self.load = load
        self.started = False
        self.told: list[str] = []
        self._tasks: Tasks | None = None
        self._failed = False
        self._said: list[str] = []

    def run(self, config: DictConfig) -> None:
        """Runs one job, with its configuration; bad input and a server's failure are told in one line."""
        self.started = True
        # Not raised through Hydra, which would end a sweep with a report of its own.
        try:
            self._tasks = self._tasks or self.load()
            self._tasks[0](config)
        except (InputError, OmegaConfBaseException, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            self.tell(error)
        except ServerError as error:
            self._failed = True
            self.tell(error)

    def end(self) -> int:
        """What is to be done after the last job; the exit status."""
        return (self._tasks[1]() if self._tasks else 0) or (1 if self._failed else 2 if self.told else 0)

    def tell(self, error: Exception) -> None:
        """Prints an error on one line, once."""
        line = one_line(error)
        if line not in self.told and processes.is_main():
            if "tqdm" in sys.modules:
                # A bar that is still open would stand on the same line.
                for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                    bar.close()
            print(f"{self.script.name}: {line}", file=sys.stderr, flush=True)
            self.told.append(line)

    def say(self, line: str) -> None:
        """Prints what is to be known before the work begins, once; nothing of an empty line."""
        if line and line not in self._said:
            print(line, flush=True)
            self._said.append(line)


def run(script: str, load: Callable[[], Tasks]) -> None:
    """Runs the jobs that the command line asks for, and exits.

    Args:
        script: Path of the entry script; `conf/<its name>.yaml` beside it is its configuration.
        load: Called when the first job starts, so that `--help` does not wait for its imports.
    """
    guard_streams()
    path = Path(script).resolve()
    jobs = Jobs(path, load)
    if not processes.is_main():
        # Of several processes that train together the main one speaks for all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    schema = _SCHEMAS[path.stem]
    done: list[dict[str, Any]] = []

    def job(config: DictConfig) -> None:
        try:
            _require_one_gpu(config)
            content = {} if schema is TrainConfig else resolved(schema, config)
        except InputError as error:
            jobs.tell(error)
            return
        if content and content in done:
            return  # a sweep of an experiment whose jobs differ for train.py only
        done.append(content)
        if schema is TrainConfig:
            jobs.say(interpolations.derived(config))
        jobs.run(config)

    job.script = path  # type: ignore[attr-defined]  # for hydra/launcher=slurm, which runs none of them here
    arguments = sys.argv[1:]
    _keep_secrets_from_hydra()
    # With this Hydra raises what it would otherwise print, several lines long, before it exits with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        sys.argv[1:] = prepared(arguments, path.name, schema, path.parent / "conf")
        hydra.main(version_base="1.3", config_path=str(path.parent / "conf"), config_name=path.stem)(job)()
        status = jobs.end()
    except Exception as error:
        # Before the first job nothing is at work but Hydra, on what the user wrote.
        if jobs.started and not isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
            raise
        why = (
            "" if jobs.started or isinstance(error, InputError) else explained(arguments, path.parent / "conf", schema)
        )
        jobs.tell(InputError(why) if why else error)
        status = 2
    except KeyboardInterrupt:
        if processes.is_main():
            print(f"{path.name}: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        status = 130
    # A launcher ends all processes when one ends with a failure, and would cut off what the main one still says.
    sys.exit(status if processes.is_main() else 0)


def _keep_secrets_from_hydra() -> None:
    """Has Hydra write a sweep's command line and configuration without secrets; it has no setting for that file."""
    save = OmegaConf.save

    def without_secrets(config: Any, f: Any, resolve: bool = False) -> None:
        content = OmegaConf.to_container(config, resolve=resolve) if OmegaConf.is_config(config) else config
        for url in re.findall(r"https?://[^\s'\",\]}]+", str(content)):
            remember_address(url)
        save(OmegaConf.create(redacted(content)), f)

    OmegaConf.save = staticmethod(without_secrets)  # type: ignore[method-assign]


def _require_one_gpu(config: DictConfig) -> None:
    """Refuses several GPUs, which one process cannot use: only Slurm, or torchrun, can give them."""
    gpus = config.resources.gpus
    if isinstance(gpus, int) and gpus > 1 and processes.count() == 1:
        line = shlex.join(["torchrun", f"--nproc_per_node={gpus}", *sys.argv])
        raise InputError(f"resources.gpus={gpus} is for hydra/launcher=slurm; here: {line}")


def one_line(error: Exception) -> str:
    """An error's text on one line; Hydra puts the useful half into the cause."""
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}: {error.__cause__}"
    return " ".join(text.partition("Config search path:")[0].split())
