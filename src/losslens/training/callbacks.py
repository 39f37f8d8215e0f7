"""What is shown and written while a run trains."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from losslens.core import distributed, preemption
from losslens.core.errors import DivergedError, InputError, first_line
from losslens.core.files import atomic_folder, read_json, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.models.adapters import adapter_hashes, save_adapter

# Names under which the trainers report, and ours.
_SEAL = "sealed.json"
# Of the files of a checkpoint those that transformers would go on without: from another state than there was.
_NEEDED = {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
_RANDOM = "rng_state"
_RENAMED = {"learning_rate": "lr", "mean_token_accuracy": "token_accuracy"}
_DROPPED = {"epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


class ProgressBar(TrainerCallback):
    """One bar a run, with the latest loss."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: tqdm | None = None

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.description,
            unit="step",
            leave=False,
            dynamic_ncols=True,
        )

    def on_step_end(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, _: TrainingArguments, __: TrainerState, ___: TrainerControl, logs: dict[str, float], **____: Any
    ) -> None:
        if self.bar is not None and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.4f}")

    def close(self) -> None:
        """Takes the bar away, however training ended."""
        if self.bar is not None:
            self.bar.close()


class Metrics(TrainerCallback):
    """Writes one line of `metrics.jsonl` a logged step, and hands the same numbers on.

    Args:
        file: The file. A run that goes on from a checkpoint keeps the lines up to it.
        examples_per_epoch: Rows that make one epoch, for the column `epoch`.
        measure: Gives further numbers of the model.
        hand_on: Called with the step and its numbers.
    """

    def __init__(
        self,
        file: Path,
        examples_per_epoch: float,
        measure: Callable[[Any], dict[str, float]],
        hand_on: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.file = file
        self.examples_per_epoch = examples_per_epoch
        self.measure = measure
        self.on_metrics = hand_on

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        kept: list[str] = []
        if self.file.exists() and state.global_step:
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= state.global_step]
        # The trainers count tokens from 0 whenever they start.
        self.tokens_before = json.loads(kept[-1])["train/num_tokens"] if kept else 0.0
        self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.since = (time.perf_counter(), self.tokens_before)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        _: TrainerControl,
        logs: dict[str, float],
        model: Any,
        **__: Any,
    ) -> None:
        values = {f"train/{_RENAMED.get(k, k)}": float(v) for k, v in logs.items() if k not in _DROPPED}
        if "train/loss" not in values:
            return
        examples = state.global_step * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        values["train/num_tokens"] += self.tokens_before
        values["train/epoch"] = examples / self.examples_per_epoch
        started = time.perf_counter()
        values |= self.measure(model)
        now, (before, tokens) = time.perf_counter(), self.since
        values["train/tokens_per_second"] = (values["train/num_tokens"] - tokens) / (now - before)
        values["geometry/share_of_time"] = (now - started) / (now - before)
        self.since = (now, values["train/num_tokens"])
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **values}) + "\n")
        self.on_metrics(state.global_step, values)


class LogFinalStep(TrainerCallback):
    """Logs the last step, too: its numbers are those of the adapter that is kept. In all processes, as they share."""

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class PreemptionCallback(TrainerCallback):
    """Where the scheduler has asked for it, ends training after the step it is at, with a checkpoint of that step."""

    def on_step_end(self, _: TrainingArguments, __: TrainerState, control: TrainerControl, **___: Any) -> None:
        # Of several processes the main one decides, so that all stop after the same step.
        if distributed.broadcast(preemption.is_requested()):
            preemption.request(signal.SIGUSR2)
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True


class ChecksumCheckpoint(TrainerCallback):
    """Seals a checkpoint once all processes have written theirs: to its run, its step and every file in it.

    Args:
        identity: What tells the run from others.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        distributed.barrier()
        if not distributed.is_main():
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_json(checkpoint / _SEAL, _seal(self.identity, state.global_step, _hashes(checkpoint)))


def checkpoint_fault(checkpoint: Path, identity: str) -> str:
    """Why a checkpoint must not be gone on from; empty for one that is as it was sealed.

    Args:
        checkpoint: Its folder, `checkpoint-<step>`.
        identity: The run that would go on.
    """
    try:
        sealed, files = read_json(checkpoint / _SEAL), _hashes(checkpoint)
    except InputError:
        return "no seal in it that can be read"
    except OSError as error:
        return first_line(error)
    if not isinstance(sealed, dict) or not isinstance(sealed.get("files"), dict):
        return "no seal in it that can be read"
    if sealed.get("run") != identity:
        return "it is of another run"
    step, then = sealed.get("step"), sealed["files"]
    if type(step) is not int or f"checkpoint-{step}" != checkpoint.name:
        return f"it is of step {step}"
    unlike = sorted(name for name in then.keys() | files.keys() if then.get(name) != files.get(name))
    if unlike:
        return f"{unlike[0]} is not as it was written"
    missing = sorted(_NEEDED - files.keys()) or [_RANDOM] * (not any(name.startswith(_RANDOM) for name in files))
    if missing or sealed != _seal(identity, step, files):
        return f"it was sealed without {missing[0]}" if missing else "its seal was changed"
    return ""


def rewrite_checksums(checkpoint: Path, before: str, now: str) -> None:
    """Seals a checkpoint to the same run's identity in another form; one that is not whole stays as it is.

    Args:
        checkpoint: Its folder.
        before: The identity that it is sealed to.
        now: The identity in its new form.
    """
    if not checkpoint_fault(checkpoint, before):
        step = int(checkpoint.name.rpartition("-")[2])
        write_json(checkpoint / _SEAL, _seal(now, step, _hashes(checkpoint)))


def _seal(identity: str, step: int, files: dict[str, str]) -> dict[str, Any]:
    content = {"run": identity, "step": step, "files": files}
    return {**content, "sha256": hash_json(content, 64)}


def _hashes(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of every file but the seal, by its path in the checkpoint.

    Raises:
        OSError: One cannot be read, or is a link to somewhere else.
    """
    hashes = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_symlink():
            raise OSError(f"{file.name} is a link")
        if not file.is_dir() and file != checkpoint / _SEAL:
            hashes[file.relative_to(checkpoint).as_posix()] = hash_file(file)
    return hashes


class Snapshots(TrainerCallback):
    """Keeps the adapter as it is after every so many steps: `step-000010/adapter`, with its hashes in `manifest.json`.

    Args:
        folder: Where. A run that goes on from a checkpoint keeps the snapshots up to it.
        every: Steps from one to the next.
        identity: What tells the run from others.
    """

    def __init__(self, folder: Path, every: int, identity: str) -> None:
        self.identity = identity
        self.folder = folder
        self.every = every

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        for snapshot in self.folder.glob("step-*") if distributed.is_main() else ():
            step = snapshot.name.removeprefix("step-")
            if step.isdigit() and int(step) > state.global_step:
                shutil.rmtree(snapshot)

    def on_step_end(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, model: Any, **___: Any
    ) -> None:
        if state.global_step % self.every == 0:
            # By every process, so that all of them end; their adapters are the same.
            require_finite(model, state.global_step)
            if not distributed.is_main():
                return
            with atomic_folder(self.folder / f"step-{state.global_step:06d}") as temporary:
                save_adapter(model, temporary / "adapter")
                bound = {"run": self.identity, "step": state.global_step, "outcomes": {}}
                write_json(temporary / "manifest.json", {**bound, **adapter_hashes(temporary / "adapter")})


def require_finite(model: Any, step: int) -> None:
    """Raises `DivergedError` when a weight that is trained is not finite."""
    if not all(parameter.isfinite().all() for parameter in model.parameters() if parameter.requires_grad):
        raise DivergedError(f"diverged: the adapter holds values that are not finite at step {step}")


class NonFiniteGuard(TrainerCallback):
    """Ends a run whose loss or gradient is no longer a number: nothing after it would mean anything."""

    def on_log(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, logs: dict[str, float], **___: Any
    ) -> None:
        for name in ("loss", "grad_norm"):
            if name in logs and not math.isfinite(float(logs[name])):
                raise DivergedError(f"diverged: {name} is {logs[name]} at step {state.global_step}")


def _step(line: str) -> float:
    """The step of a line; infinity for one that was cut off in the middle."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
