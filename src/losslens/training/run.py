"""Trains one run from the base and the initial adapter to the finished adapter, or on from its last checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from losslens.config.training import Optim
from losslens.core import distributed, preemption
from losslens.core.errors import InputError
from losslens.core.files import atomic_folder
from losslens.losses import Loss
from losslens.models.adapters import LoraSettings, load_adapter, save_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.training.callbacks import (
    ChecksumCheckpoint,
    LogFinalStep,
    Metrics,
    NonFiniteGuard,
    PreemptionCallback,
    ProgressBar,
    Snapshots,
    checkpoint_fault,
    require_finite,
)
from losslens.training.lm_head import has_plain_head, score_selected_positions
from losslens.training.source import RolloutSource
from losslens.training.trainer import LossTrainer
from losslens.training.trl_internals import has_fused_head
from losslens.training.weight_tracking import WeightTrackingCallback


@dataclass(frozen=True)
class TrainingPlan:
    """All that decides a run, besides the base and the rollouts.

    Attributes:
        loss: The loss.
        learning_rate: Peak learning rate.
        lora: The adapter.
        initial_adapter: Folder of the adapter to start from.
        optim: Optimiser, schedule, batch.
        seed: Seed of LoRA dropout.
        identity: What tells the run from others: its checkpoints and snapshots carry it.
    """

    loss: Loss
    learning_rate: float
    lora: LoraSettings
    initial_adapter: Path
    optim: Optim
    seed: int
    identity: str = ""


def make_trainer(
    plan: TrainingPlan,
    base: LoadedModel,
    source: RolloutSource,
    output_dir: Path,
    callbacks: list[TrainerCallback],
    selected_head: bool | None = None,
    way: tuple[int, bool] | None = None,
) -> LossTrainer:
    """The trainer of `plan` with the initial adapter in place, and the base's reference where it is known beforehand.

    Args:
        plan: What to train.
        base: The base; it is changed, so lend it with `preserved`.
        source: The examples of each step.
        output_dir: Where checkpoints go.
        callbacks: Added to the trainer's own.
        selected_head: Whether `score_selected_positions` takes the place of TRL's fused head; by default off CUDA, for
            models with a plain head.
        way: Examples in one forward pass, and whether with gradient checkpointing; the first of `Optim.ways` if None.

    Raises:
        InputError: The batch cannot be shared by the processes, the reference is not this base's, or the installed TRL
            cannot score the model's tokens.
    """
    on_cuda = base.model.device.type == "cuda"
    optim = plan.optim
    at_once, checkpointing = way or optim.microbatch_plans(distributed.world_size(), plan.lora.dropout > 0)[0]
    arguments = {
        "output_dir": str(output_dir),
        "learning_rate": plan.learning_rate,
        "max_steps": optim.steps(source.epoch_length),
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": optim.per_process_batch(distributed.world_size()) // at_once,
        "lr_scheduler_type": optim.scheduler,
        "warmup_steps": optim.warmup_ratio,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "logging_steps": optim.log_steps,
        "logging_nan_inf_filter": False,
        "save_steps": optim.save_steps,
        "save_total_limit": 2,  # the one before, should the last one be damaged
        "max_length": None,
        "seed": plan.seed,
        "bf16": base.model.dtype == torch.bfloat16,
        "fp16": base.model.dtype == torch.float16,
        "use_cpu": not on_cuda,
        "disable_tqdm": True,
        "report_to": "none",
        # Otherwise torch moves the gradients to other buckets after the first step, and three processes or more that go
        # on from a checkpoint sum them in another order: not to the same bytes.
        "ddp_find_unused_parameters": True,
    }
    trainer = LossTrainer(
        plan.loss,
        source,
        args=_on_one_gpu(SFTConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})),
        model=base.model,
        processing_class=base.tokenizer,
        peft_config=plan.lora.peft_config(base.model),
        callbacks=callbacks,
    )
    if selected_head if selected_head is not None else not on_cuda and has_plain_head(base.model):
        score_selected_positions(trainer.model.get_base_model())
    elif not has_fused_head():
        raise InputError("TRL's fused head, which this model's training takes, needs Triton or trl>=1.16")
    # The bar and `metrics.jsonl` say what the trainer would print.
    trainer.remove_callback(PrinterCallback)
    load_adapter(trainer.model, plan.initial_adapter)
    kept = source.score(trainer.base_logps, base.tokenizer.pad_token_id)
    if kept is not None:
        trainer.require_base(str(kept))
    return trainer


def _on_one_gpu(arguments: Any) -> Any:
    """The same arguments for one GPU: where there are several, the trainer would multiply the batch by their number."""
    _ = arguments.device  # counts them
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def train_run(
    plan: TrainingPlan,
    base: LoadedModel,
    source: RolloutSource,
    folder: Path,
    hand_on: Callable[[int, dict[str, float]], None],
    references: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Trains `plan` in `folder`: checkpoints below it while it works, `adapter/` at the end, `snapshots/` if asked for.

    Of several processes, who all call it in `processes.together`, the main one writes them.

    Args:
        plan: What to train.
        base: The base; it is the same afterwards.
        source: The examples of each step.
        folder: The run's folder.
        hand_on: Called with each logged step and its numbers.
        references: Adapters that the growing one is compared with at every logged step, by their labels.

    Returns:
        Steps, examples an epoch (`rows`), epochs, processes, the step gone on from, and, since then, seconds and peak
        GPU memory (of this process).

    Raises:
        InputError: As for `make_trainer`.
        DivergedError: The loss, its gradient or the adapter is not finite.
        Preempted: The scheduler asked for it to stop; there is a checkpoint of the last step.
    """
    checkpoints = folder / "checkpoints"
    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    resumed_from: int | None = None
    distributed.init_process_group("nccl" if base.model.device.type == "cuda" else "gloo")
    ways = plan.optim.microbatch_plans(distributed.world_size(), plan.lora.dropout > 0)
    for number, way in enumerate(ways, 1):
        last = _agreed_checkpoint(checkpoints, plan.identity)
        resumed_from = _step_of(last) if resumed_from is None else resumed_from
        try:
            _train(plan, base, source, folder, hand_on, references or {}, way, last)
            break
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            if number == len(ways):
                if plan.lora.dropout > 0 and plan.optim.micro_batch == "auto":
                    raise RuntimeError(
                        f"{way[0]} at once do not fit; with lora_rank.dropout nothing smaller is tried, as it would be"
                        " another run: set optim.micro_batch"
                    ) from error
                raise
            if distributed.world_size() > 1:
                # The others wait for this one's gradients, and do not know what it would try next.
                raise RuntimeError(
                    f"{way[0]} at once do not fit, and several processes cannot try what does: set optim.micro_batch"
                    " lower, or optim.gradient_checkpointing=true"
                ) from error
        # Out of the `except`, whose traceback would keep what did not fit alive.
        release_memory()
        at_once, checkpointing = ways[number]
        aid = ", with gradient checkpointing" if checkpointing else ""
        print(f"{folder.name}: {way[0]} at once do not fit; going on with {at_once}{aid}", flush=True)
    distributed.barrier()  # nobody reads or writes a checkpoint any more
    if distributed.is_main():
        shutil.rmtree(checkpoints, ignore_errors=True)
    rows = source.epoch_length
    return {
        "steps": plan.optim.steps(rows),
        "rows": rows,
        "epochs": plan.optim.steps(rows) * plan.optim.batch_size / rows,
        "processes": distributed.world_size(),
        "resumed_from": resumed_from,
        "micro_batch": way[0],
        "gradient_checkpointing": way[1],
        "seconds": round(time.monotonic() - started, 2),
        "threads": torch.get_num_threads(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def _train(
    plan: TrainingPlan,
    base: LoadedModel,
    source: RolloutSource,
    folder: Path,
    hand_on: Callable[[int, dict[str, float]], None],
    references: Mapping[str, Path],
    way: tuple[int, bool],
    last: Path | None,
) -> None:
    """Trains from the checkpoint `last` to the end and writes the adapter."""
    # One process trains runs of different precision one after another; accelerate keeps the first one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    with preserved(base.model):
        bar = ProgressBar(folder.name)
        callbacks: list[TrainerCallback] = [NonFiniteGuard(), LogFinalStep(), PreemptionCallback()]
        callbacks.append(ChecksumCheckpoint(plan.identity))
        if plan.optim.snapshot_steps:
            callbacks.append(Snapshots(folder / "snapshots", plan.optim.snapshot_steps, plan.identity))
        geometry = WeightTrackingCallback(plan.initial_adapter, references) if distributed.is_main() else None
        if geometry is not None:
            callbacks.insert(0, geometry)  # before the checkpoint is sealed
        trainer = make_trainer(plan, base, source, folder / "checkpoints", callbacks, way=way)
        if geometry is not None:
            trainer.add_callback(bar)
            trainer.add_callback(Metrics(folder / "metrics.jsonl", source.epoch_length, geometry.measure, hand_on))
        else:
            # All begin at the seed; what LoRA dropout leaves out must not be the same for each one's rows.
            torch.manual_seed(plan.seed + distributed.rank())
        try:
            # A signal in the middle of a step ends training after it.
            with preemption.deferred():
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            bar.close()
        require_finite(trainer.model, trainer.state.global_step)
        if distributed.is_main():
            with atomic_folder(folder / "adapter") as temporary:
                save_adapter(trainer.model, temporary)


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _agreed_checkpoint(folder: Path, identity: str) -> Path | None:
    """The `last_checkpoint` as the main process finds it, for all."""
    last = last_checkpoint(folder, identity) if distributed.is_main() else None
    name = distributed.broadcast(None if last is None else last.name)
    return None if name is None else folder / name


def last_checkpoint(folder: Path, identity: str) -> Path | None:
    """The latest checkpoint that is this run's, and as it was written.

    Of the others those whose name a checkpoint of this run may get are removed.

    Args:
        folder: Where they lie.
        identity: What tells the run from others.
    """
    whole = []
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        why = checkpoint_fault(checkpoint, identity)
        if not why:
            whole.append(checkpoint)
            continue
        print(f"{checkpoint}: {why}; left out", flush=True)
        if checkpoint.name.rpartition("-")[2].isdigit():
            _remove(checkpoint)
    return max(whole, key=_step_of, default=None)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
