"""Guards: trainer callbacks that end a run which has diverged or hangs, with the reason."""

from __future__ import annotations

import faulthandler
import math
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from losslens.core.errors import DivergedError
from losslens.core.files import remove_link
from losslens.models.trained_weights import base_norm, update_norm

# ‖ΔW‖_F over ‖W0‖_F: far beyond any update that is of use (a few per cent), and before float32 overflows.
_MAX_RELATIVE_NORM = 10.0
# Seconds after which a process that no signal reaches is ended.
_GRACE = 60.0


def require_finite(model: Any, step: int) -> None:
    """Checks that all trained weights are finite.

    Raises:
        DivergedError: A weight is NaN or infinite.
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
        raise DivergedError(f"diverged: the adapter has non-finite weights at step {step}")


class NonFiniteGuard(TrainerCallback):
    """Stops a run whose loss or gradient norm is NaN or infinite."""

    def on_log(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, logs: dict[str, float], **___: Any
    ) -> None:
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise DivergedError(f"diverged: {name} is {logs[name]} at step {state.global_step}")


class ExplosionGuard(TrainerCallback):
    """Stops a run whose update is ten times as large as the weights that it changes, in the Frobenius norm.

    Every process computes it, so that all stop at the same step.
    """

    def __init__(self) -> None:
        self._base = 0.0

    def on_train_begin(
        self, _: TrainingArguments, __: TrainerState, ___: TrainerControl, model: Any, **____: Any
    ) -> None:
        self._base = base_norm(model)

    def on_log(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, model: Any, **___: Any) -> None:
        norm = update_norm(model)
        if self._base and norm > _MAX_RELATIVE_NORM * self._base:
            raise DivergedError(
                f"diverged: the norm of the update, {norm:.3g}, is {norm / self._base:.3g} times that of the base's "
                f"weights at step {state.global_step}"
            )


class StallGuard(TrainerCallback):
    """Ends a run of which a step takes too long: something it waits for does not answer.

    A signal raises TimeoutError in the main thread, wherever that waits. If it is in a call that no signal interrupts,
    the process writes the stacks of its threads to a file and ends with status 1.

    Args:
        minutes: The longest a step may take; None for ever.
        file: File for the stacks; None for stderr.
    """

    def __init__(self, minutes: float | None, file: Path | None) -> None:
        can_signal = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
        self._minutes = minutes if can_signal else None
        self._file = file
        self._stacks: TextIO | None = None
        self._before: Any = None
        self._step = 0

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        if self._minutes is None:
            return
        self._before = signal.signal(signal.SIGALRM, self._stop)
        if self._file is None:
            self._stacks = sys.__stderr__
        else:
            remove_link(self._file)
            self._stacks = self._file.open("w", encoding="utf-8")
        self._wait_for(state.global_step + 1)

    def on_step_end(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        self._wait_for(state.global_step + 1)

    def close(self) -> None:
        """Stops watching, however training ended."""
        if self._stacks is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._stacks.close()
            self._file.unlink(missing_ok=True)
        self._stacks = None

    def _wait_for(self, step: int) -> None:
        if self._stacks is None or self._minutes is None:
            return
        self._step, seconds = step, 60 * self._minutes
        signal.setitimer(signal.ITIMER_REAL, seconds)
        faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=self._stacks)

    def _stop(self, _: int, __: FrameType | None) -> None:
        raise TimeoutError(
            f"step {self._step} has taken more than {self._minutes:g} minutes (optim.max_step_minutes): what it waits "
            "for does not answer"
        )
