"""The jobs of an entry script in one process, and process-wide settings that must precede other imports."""

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
from losslens.core.commands import command_name
from losslens.core.errors import InputError, ServerError, describe_storage_error
from losslens.core.extras import format_error, missing_extra

# With the default threshold, garbage collection takes a quarter of the time of importing torch, transformers and PEFT.
gc.set_threshold(10_000)
# Otherwise TRL reports every trainer to its developers.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if not sys.stderr.isatty():
    # Keeps logs from filling up with progress bars.
    os.environ.setdefault("TQDM_MININTERVAL", "10")
# Hydra shows the log messages of libraries; these log every request or glyph.
for _client in ("httpx", "httpx2", "openai", "fontTools"):
    logging.getLogger(_client).setLevel(logging.WARNING)
# TRL and PEFT still use the old name.
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)
# GPT-2 stores transposed weights; PEFT detects that and adapts the setting itself.
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning, module=r"peft\.")
# transformers aligns the model's configuration with the tokenizer; adapters do not contain that configuration.
logging.getLogger("transformers.trainer_utils").addFilter(
    lambda record: "new PAD/BOS/EOS tokens" not in str(record.msg)
)

# The function that does one job, and the one called after the last job, which returns the exit status.
Tasks = tuple[Callable[[DictConfig], None], Callable[[], int]]


class Jobs:
    """The jobs of an entry script in one process, and their outcome.

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
        self._printed: list[str] = []

    def run(self, config: DictConfig) -> None:
        """Runs one job with its configuration; reports invalid input and server failures in one line."""
        self.started = True
        # Errors must not propagate through Hydra, which would end a sweep with its own report.
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
        except Exception as error:
            if not (line := describe_storage_error(error, Path(config.output_dir))):
                raise
            self._failed = True
            self.tell(OSError(line))

    def end(self) -> int:
        """Finishes after the last job and returns the exit status."""
        return (self._tasks[1]() if self._tasks else 0) or (1 if self._failed else 2 if self.told else 0)

    def tell(self, error: Exception) -> None:
        """Prints an error on one line, unless the same line was printed before."""
        line = on_one_line(error)
        if line not in self.told and distributed.is_main():
            if "tqdm" in sys.modules:
                # An open progress bar would share the line.
                for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                    bar.close()
            print(format_error(command_name(self.script.name), error, line), file=sys.stderr, flush=True)
            self.told.append(line)

    def say(self, line: str) -> None:
        """Prints a line about the job to come, unless it is empty or was printed before."""
        if line and line not in self._printed:
            print(line, flush=True)
            self._printed.append(line)


def on_one_line(error: Exception) -> str:
    """Formats an error's message on one line, with its cause, where Hydra puts the useful half."""
    text = str(error)
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.full_key not in text:
        text = f"{error.full_key}: {text}"
    if isinstance(error.__cause__, OmegaConfBaseException):
        text = f"{text}: {error.__cause__}"
    return " ".join(text.partition("Config search path:")[0].split())
