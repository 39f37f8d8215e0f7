"""The jobs of an entry script in one process, and what every such process sets before other libraries are imported."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from losslens.core import distributed
from losslens.core.commands import called
from losslens.core.errors import InputError, ServerError
from losslens.core.extras import missing_extra, tell

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
        except ModuleNotFoundError as error:
            missing = missing_extra(error)
            if missing is None:
                raise
            self.tell(missing)
        except ServerError as error:
            self._failed = True
            self.tell(error)

    def end(self) -> int:
        """What is to be done after the last job; the exit status."""
        return (self._tasks[1]() if self._tasks else 0) or (1 if self._failed else 2 if self.told else 0)

    def tell(self, error: Exception) -> None:
        """Prints an error on one line, once."""
        line = on_one_line(error)
        if line not in self.told and distributed.is_main():
            if "tqdm" in sys.modules:
                # A bar that is still open would stand on the same line.
                for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                    bar.close()
            print(tell(called(self.script.name), error, line), file=sys.stderr, flush=True)
            self.told.append(line)

    def say(self, line: str) -> None:
        """Prints what is to be known before the work begins, once; nothing of an empty line."""
        if line and line not in self._said:
            print(line, flush=True)
            self._said.append(line)


def on_one_line(error: Exception) -> str:
    """An error's text on one line; Hydra puts the useful half into the cause."""
    text = str(error)
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}: {error.__cause__}"
    return " ".join(text.partition("Config search path:")[0].split())
