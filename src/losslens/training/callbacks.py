"""Trainer callbacks: progress bar, metrics, checkpoints, snapshots and preemption."""

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
from losslens.core.errors import InputError, first_line
from losslens.core.files import atomic_file, atomic_folder, read_json, remove_entry, remove_leftovers, write_json
from losslens.core.hashing import hash_file, hash_json
from losslens.models.trained_weights import folder_of, save_weights, weights_hashes
from losslens.training.guards import require_finite

_CHECKSUMS = "sealed.json"
# Files without which transformers would silently resume from a different state.
_REQUIRED = {"optimizer.pt", "scheduler.pt", "trainer_state.json"}
_ADAPTER, _MODEL = {"adapter_config.json", "adapter_model.safetensors"}, {"config.json", "model.safetensors"}
_SHARDS = "model.safetensors.index.json"
_RNG_STATE = "rng_state"
# The trainer's metric names and ours.
_RENAMED = {"learning_rate": "lr", "mean_token_accuracy": "token_accuracy"}
_DROPPED = {"epoch", "total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


class ProgressBar(TrainerCallback):
    """Shows a progress bar with the latest loss."""

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
        """Removes the bar, however training ended."""
        if self.bar is not None:
            self.bar.close()


class Metrics(TrainerCallback):
    """Writes one line of `metrics.jsonl` per logged step, and passes the same values to `on_metrics`.

    Args:
        file: The file. Each checkpoint has a copy, from which it is restored when a run resumes.
        examples_per_epoch: Examples in one epoch, for the column `epoch`.
        measure: Computes further metrics of the model.
        on_metrics: Called with the step and its metrics.
    """

    def __init__(
        self,
        file: Path,
        examples_per_epoch: float,
        measure: Callable[[Any], dict[str, float]],
        on_metrics: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.file = file
        self.examples_per_epoch = examples_per_epoch
        self.measure = measure
        self.on_metrics = on_metrics

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        kept: list[str] = []
        copy = self._copy(args, state)
        source = copy if copy.is_file() else self.file  # checkpoints of earlier versions have none
        if source.is_file() and state.global_step:
            lines = source.read_bytes().decode("utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step(line) <= state.global_step]
        # The trainer's token count restarts at 0 when it resumes.
        self.tokens_before = _number(kept[-1], "train/num_tokens", 0.0) if kept else 0.0
        with atomic_file(self.file) as temporary:  # which replaces a link, too
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
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

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        shutil.copyfile(self.file, self._copy(args, state))

    def _copy(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / self.file.name


class LogFinalStep(TrainerCallback):
    """Logs the last step as well, since its metrics describe the final adapter; runs in all processes."""

    def on_step_end(self, _: TrainingArguments, state: TrainerState, control: TrainerControl, **__: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class PreemptionCallback(TrainerCallback):
    """Stops training after the current step, with a checkpoint, if the scheduler has asked for it."""

    def on_step_end(self, _: TrainingArguments, __: TrainerState, control: TrainerControl, **___: Any) -> None:
        # The main process decides, so that all processes stop after the same step.
        if distributed.broadcast(preemption.is_requested()):
            preemption.request(signal.SIGUSR2)
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True


class ChecksumCheckpoint(TrainerCallback):
    """Writes the checksums of a checkpoint's files, with its run and step, once all processes have saved it.

    Args:
        identity: Fingerprint of the run.
    """

    def __init__(self, identity: str) -> None:
        self.identity = identity

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        distributed.barrier()
        if not distributed.is_main():
            return
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_json(checkpoint / _CHECKSUMS, _checksums(self.identity, state.global_step, _hashes(checkpoint)))


def checkpoint_fault(checkpoint: Path, identity: str) -> str:
    """Returns why a checkpoint must not be resumed from; empty if it is intact and belongs to the run.

    Args:
        checkpoint: Its folder, `checkpoint-<step>`.
        identity: Fingerprint of the run to resume.
    """
    try:
        recorded, files = read_json(checkpoint / _CHECKSUMS), _hashes(checkpoint)
    except InputError:
        return f"{_CHECKSUMS} is missing or damaged"
    except OSError as error:
        return first_line(error)
    if not isinstance(recorded, dict) or not isinstance(recorded.get("files"), dict):
        return f"{_CHECKSUMS} is missing or damaged"
    if recorded.get("run") != identity:
        return "it belongs to another run"
    step, written = recorded.get("step"), recorded["files"]
    if type(step) is not int or f"checkpoint-{step}" != checkpoint.name:
        return f"it is the checkpoint of step {step}"
    changed = sorted(name for name in written.keys() | files.keys() if written.get(name) != files.get(name))
    if changed:
        return f"{changed[0]} does not match its checksum"
    weights = _ADAPTER if "config.json" not in files else {"config.json"} if _SHARDS in files else _MODEL
    missing = sorted((weights | _REQUIRED) - files.keys()) or [_RNG_STATE] * (
        not any(name.startswith(_RNG_STATE) for name in files)
    )
    if missing or recorded != _checksums(identity, step, files):
        return f"it was written without {missing[0]}" if missing else f"{_CHECKSUMS} was changed"
    return ""


def rewrite_checksums(checkpoint: Path, before: str, now: str) -> None:
    """Records a checkpoint under its run's new fingerprint; leaves one that is not intact unchanged.

    Args:
        checkpoint: Its folder.
        before: Fingerprint that it is recorded under.
        now: New fingerprint of the same run.
    """
    remove_leftovers(checkpoint)  # of a process that was killed here, which would be a file too many
    if not checkpoint_fault(checkpoint, before):
        step = int(checkpoint.name.rpartition("-")[2])
        write_json(checkpoint / _CHECKSUMS, _checksums(now, step, _hashes(checkpoint)))


def _checksums(identity: str, step: int, files: dict[str, str]) -> dict[str, Any]:
    content = {"run": identity, "step": step, "files": files}
    return {**content, "sha256": hash_json(content, 64)}


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file but the checksum file, by its path in the checkpoint.

    Raises:
        OSError: A file cannot be read or is a symbolic link.
    """
    hashes = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_symlink():
            raise OSError(f"{file.name} is a symbolic link")
        if not file.is_dir() and file != checkpoint / _CHECKSUMS:
            hashes[file.relative_to(checkpoint).as_posix()] = hash_file(file)
    return hashes


class Snapshots(TrainerCallback):
    """Saves the weights every `every` steps: `step-000010/adapter` (or `model`), with hashes in `manifest.json`.

    Args:
        folder: Folder of the snapshots. When a run resumes from a checkpoint, those up to that step are kept.
        every: Steps between snapshots.
        identity: Fingerprint of the run.
    """

    def __init__(self, folder: Path, every: int, identity: str) -> None:
        self.identity = identity
        self.folder = folder
        self.every = every

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        for snapshot in self.folder.glob("step-*") if distributed.is_main() else ():
            step = snapshot.name.removeprefix("step-")
            if step.isdigit() and int(step) > state.global_step:
                remove_entry(snapshot)

    def on_step_end(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, model: Any, **___: Any
    ) -> None:
        if state.global_step % self.every == 0:
            # Checked by every process, so that all of them stop; their adapters are the same.
            require_finite(model, state.global_step)
            if not distributed.is_main():
                return
            with atomic_folder(self.folder / f"step-{state.global_step:06d}") as temporary:
                weights = temporary / folder_of(model)
                save_weights(model, weights)
                manifest = {"run": self.identity, "step": state.global_step, "outcomes": {}}
                write_json(temporary / "manifest.json", {**manifest, **weights_hashes(weights)}, sealed=True)


def _step(line: str) -> float:
    """The step of a line; infinity for a truncated line."""
    return _number(line, "step", math.inf)


def _number(line: str, name: str, default: float) -> float:
    """A number in a line of JSON; `default` if the line is damaged."""
    try:
        return float(json.loads(line)[name])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return default
