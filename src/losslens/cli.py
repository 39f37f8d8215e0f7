"""The entry scripts' shared frame: Hydra composes, one call works, and the exit status tells how it ended.

0: done. 1: a failure while working. 2: bad input, told in one line on stderr without a traceback.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import losslens.config  # noqa: F401 (teaches OmegaConf the interpolations of conf/)
from losslens import processes
from losslens.errors import InputError, ServerError

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

# What does one job, and what is called after the last one and gives the exit status.
Tasks = tuple[Callable[[DictConfig], None], Callable[[], int]]


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
        _tell(self.script, error, self.told)


def run(script: str, load: Callable[[], Tasks]) -> None:
    """Runs the jobs that the command line asks for, and exits.

    Args:
        script: Path of the entry script; `conf/<its name>.yaml` beside it is its configuration.
        load: Called when the first job starts, so that `--help` does not wait for its imports.
    """
    path = Path(script).resolve()
    jobs = Jobs(path, load)
    if not processes.is_main():
        # Of several processes that train together the main one speaks for all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def job(config: DictConfig) -> None:
        try:
            _require_one_gpu(config)
        except InputError as error:
            jobs.tell(error)
        else:
            jobs.run(config)

    job.script = path  # type: ignore[attr-defined]  # for hydra/launcher=slurm, which runs none of them here
    if "hydra/launcher=slurm" in sys.argv and not {"-m", "--multirun", "--cfg", "-c"} & set(sys.argv):
        sys.argv.append("--multirun")  # Hydra has launchers for sweeps only, and would run a single job here
    # With this Hydra raises what it would otherwise print, several lines long, before it exits with status 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(path.parent / "conf"), config_name=path.stem)(job)()
        status = jobs.end()
    except Exception as error:
        # Before the first job nothing is at work but Hydra, on what the user wrote.
        if jobs.started and not isinstance(error, (InputError, HydraException, OmegaConfBaseException)):
            raise
        jobs.tell(error)
        status = 2
    except KeyboardInterrupt:
        if processes.is_main():
            print(f"{path.name}: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        status = 130
    # A launcher ends all processes when one ends with a failure, and would cut off what the main one still says.
    sys.exit(status if processes.is_main() else 0)


def _require_one_gpu(config: DictConfig) -> None:
    """Refuses what only Slurm, or torchrun, can give.

    Raises:
        InputError: The configuration asks for several GPUs, which one process cannot use.
    """
    gpus = config.resources.gpus
    if isinstance(gpus, int) and gpus > 1 and processes.count() == 1:
        line = shlex.join(["torchrun", f"--nproc_per_node={gpus}", *sys.argv])
        raise InputError(f"resources.gpus={gpus} is for hydra/launcher=slurm; here: {line}")


def _tell(path: Path, error: Exception, told: list[str]) -> None:
    """Prints an error on one line, once."""
    line = one_line(error)
    if "Config group override must be a string" in line:  # Hydra does not say which
        groups = path.parent / "conf"
        pairs = [argument.partition("=") for argument in sys.argv[1:]]
        wrong = [
            f"{key}={value}"
            for key, _, value in pairs
            if (groups / key).is_dir() and (value[:1].isdigit() or value in ("null", "true", "false"))
        ]
        line = f"{' '.join(wrong)}: a group takes one of its options by name (see --help), or none of them: [],"
        line += " not a number or null"
    if line not in told and processes.is_main():
        if "tqdm" in sys.modules:
            # A bar that is still open would stand on the same line.
            for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                bar.close()
        print(f"{path.name}: {line}", file=sys.stderr, flush=True)
        told.append(line)


def one_line(error: Exception) -> str:
    """An error's text on one line; Hydra puts the useful half into the cause."""
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}: {error.__cause__}"
    return " ".join(text.partition("Config search path:")[0].split())
