"""Training of one run, from the base and the initial adapter or from its last checkpoint to the trained weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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
from losslens.core.files import atomic_folder, remove_entry
from losslens.losses import Loss, Method
from losslens.models.adapters import LoraSettings
from losslens.models.loading import LoadedModel, preserved
from losslens.models.trained_weights import (
    causal_model,
    changes_weights,
    folder_of,
    load_start,
    peft_config,
    save_weights,
)
from losslens.training.callbacks import (
    ChecksumCheckpoint,
    LogFinalStep,
    Metrics,
    PreemptionCallback,
    ProgressBar,
    Snapshots,
    checkpoint_fault,
)
from losslens.training.distributions import require_computable
from losslens.training.guards import ExplosionGuard, NonFiniteGuard, StallGuard, require_finite
from losslens.training.lm_head import has_plain_head, score_selected_positions
from losslens.training.packing import pack_rows
from losslens.training.source import OnPolicySource, RolloutSource
from losslens.training.trainer import LossTrainer
from losslens.training.trl_internals import has_fused_head, require_on_policy
from losslens.training.weight_tracking import weight_tracking


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that determines a run, besides the base and the rollouts.

    Attributes:
        method: The loss or on-policy method.
        learning_rate: Peak learning rate.
        lora: Settings of the adapter; None for full fine-tuning.
        initial_adapter: Folder of the initial adapter; None for full fine-tuning.
        optim: Optimiser, schedule, batch.
        seed: Seed of LoRA dropout and, for an on-policy method, of its samples.
        identity: Fingerprint of the run, recorded in its checkpoints and snapshots.
    """

    method: Method
    learning_rate: float
    lora: LoraSettings | None
    initial_adapter: Path | None
    optim: Optim
    seed: int
    identity: str = ""

    @property
    def has_dropout(self) -> bool:
        """True if the adapter has dropout, so that the micro-batch affects the result."""
        return self.lora is not None and self.lora.dropout > 0


def make_trainer(
    plan: TrainingPlan,
    base: LoadedModel,
    source: RolloutSource | OnPolicySource,
    output_dir: Path,
    callbacks: list[TrainerCallback],
    selected_head: bool | None = None,
    packed: bool | None = None,
    microbatch_plan: tuple[int, bool] | None = None,
) -> Any:
    """Builds the trainer of `plan`, with the initial adapter loaded and precomputed reference log-probabilities.

    Args:
        plan: The plan of the run.
        base: The base; it is modified, so call this within `preserved`.
        source: Source of the examples of each step, or of the problems to sample for.
        output_dir: Folder for checkpoints.
        callbacks: Added to the trainer's own.
        selected_head: Use `score_selected_positions` instead of TRL's fused head; by default only off CUDA, for models
            with a plain head.
        packed: Lay the examples of a step into micro-batches by length, and process them without padding if the model
            allows it (`pack_rows`); by default unless there is dropout, which drops other entries in another layout.
        microbatch_plan: Examples per forward pass, and whether to use gradient checkpointing; by default the first of
            `Optim.microbatch_plans`.

    Raises:
        InputError: The batch cannot be divided among the processes, the reference is of another base, or the
            installed TRL cannot score the model's tokens, or not compute the distributions that the loss needs.
    """
    on_cuda = base.model.device.type == "cuda"
    optim = plan.optim
    if microbatch_plan is None:
        microbatch_plan = optim.microbatch_plans(distributed.world_size(), plan.has_dropout)[0]
    micro_batch, checkpointing = microbatch_plan
    packed = not plan.has_dropout if packed is None else packed
    arguments = {
        "output_dir": str(output_dir),
        "learning_rate": plan.learning_rate,
        "max_steps": optim.steps(source.epoch_length),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": optim.per_process_batch(distributed.world_size()) // micro_batch,
        "lr_scheduler_type": optim.scheduler,
        "warmup_steps": optim.warmup_ratio,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "logging_steps": optim.log_steps,
        "logging_nan_inf_filter": False,
        "save_steps": optim.save_steps,
        "save_total_limit": 2,  # in case the last one is damaged
        "seed": plan.seed,
        "bf16": base.model.dtype == torch.bfloat16,
        "fp16": base.model.dtype == torch.float16,
        "use_cpu": not on_cuda,
        "disable_tqdm": True,
        "report_to": "none",
        # Otherwise torch rebuilds the gradient buckets after the first step, and three or more processes that resume
        # from a checkpoint sum gradients in another order: the result is not byte-identical.
        "ddp_find_unused_parameters": True,
    }
    config, make = _config_and_trainer(plan, source, arguments, on_cuda, packed)
    trainer = make(
        args=_on_one_gpu(config),
        model=base.model,
        processing_class=base.tokenizer,
        peft_config=peft_config(base.model, plan.lora),
        callbacks=callbacks,
    )
    if isinstance(plan.method, Loss):
        require_computable(causal_model(trainer.model), plan.method)
    if selected_head if selected_head is not None else not on_cuda and has_plain_head(base.model):
        score_selected_positions(causal_model(trainer.model), getattr(plan.method, "temperature", 1.0))
    elif not has_fused_head():
        raise InputError("training this model uses TRL's fused head, which needs Triton or trl>=1.16")
    if packed:
        pack_rows(causal_model(trainer.model))
        if isinstance(source, OnPolicySource) and source.teacher is not None:
            pack_rows(source.teacher.model)
    trainer.remove_callback(PrinterCallback)
    load_start(trainer.model, plan.initial_adapter)
    if isinstance(trainer, LossTrainer):
        reference_file = trainer.source.score(trainer.base_logps, base.tokenizer.pad_token_id)
        if reference_file is not None:
            trainer.require_base(str(reference_file))
    return trainer


def _config_and_trainer(
    plan: TrainingPlan, source: RolloutSource | OnPolicySource, arguments: dict[str, Any], on_cuda: bool, packed: bool
) -> tuple[Any, Callable[..., Any]]:
    """Returns TRL's configuration and a function that builds the trainer from it."""
    if isinstance(source, OnPolicySource):
        require_on_policy()
        from losslens.training.on_policy import config_and_trainer

        return config_and_trainer(source, arguments, on_cuda)
    assert isinstance(plan.method, Loss)
    config = SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return config, partial(LossTrainer, plan.method, source, packed)


def _on_one_gpu(arguments: Any) -> Any:
    """Restricts the arguments to one GPU; the trainer would multiply the batch by the number of visible GPUs."""
    _ = arguments.device  # counts the GPUs
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def train_run(
    plan: TrainingPlan,
    base: LoadedModel,
    source: RolloutSource | OnPolicySource,
    folder: Path,
    on_metrics: Callable[[int, dict[str, float]], None],
    references: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Trains `plan` in `folder`: writes checkpoints, `adapter/` or `model/` at the end, and `snapshots/` if configured.

    The checkpoints stay: whoever records the result deletes them.

    With several processes, all of them call this within `distributed.lockstep`, and the main process writes the files.

    Args:
        plan: The plan of the run.
        base: The base; unchanged afterwards.
        source: Source of the examples of each step, or of the problems to sample for.
        folder: The run's folder.
        on_metrics: Called with each logged step and its metrics.
        references: Folders of the reference adapters to compare with at every logged step, by label.

    Returns:
        Facts for the manifest: steps, examples per epoch (`rows`), epochs, processes, the step resumed from, and, since
        then, seconds and peak GPU memory (of this process).

    Raises:
        InputError: See `make_trainer`.
        DivergedError: The loss, its gradient or the adapter is not finite, or the update larger than the base.
        TimeoutError: A step has taken longer than `optim.max_step_minutes`.
        Preempted: The scheduler has asked the run to stop; there is a checkpoint of the last step.
    """
    checkpoints = folder / "checkpoints"
    started = time.monotonic()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    resumed_from: int | None = None
    distributed.init_process_group("nccl" if base.model.device.type == "cuda" else "gloo")
    microbatch_plans = plan.optim.microbatch_plans(distributed.world_size(), plan.has_dropout)
    for number, (micro_batch, gradient_checkpointing) in enumerate(microbatch_plans, 1):
        last = _agreed_checkpoint(checkpoints, plan.identity)
        resumed_from = _step_of(last) if resumed_from is None else resumed_from
        try:
            microbatch_plan = (micro_batch, gradient_checkpointing)
            _train(plan, base, source, folder, on_metrics, references or {}, microbatch_plan, last)
            break
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            if number == len(microbatch_plans):
                if plan.has_dropout and plan.optim.micro_batch == "auto":
                    raise RuntimeError(
                        f"out of memory with a micro-batch of {micro_batch}; with lora_rank.dropout no smaller one is"
                        " tried, since it would be a different run: set optim.micro_batch"
                    ) from error
                raise
            if distributed.world_size() > 1:
                # The other processes wait for this one's gradients and cannot follow it to another micro-batch.
                raise RuntimeError(
                    f"out of memory with a micro-batch of {micro_batch}; with several processes no smaller one is"
                    " tried: set a smaller optim.micro_batch, or optim.gradient_checkpointing=true"
                ) from error
        # Outside the `except` block, whose traceback keeps the tensors alive.
        release_memory()
        smaller, checkpointing = microbatch_plans[number]
        note = " and gradient checkpointing" if checkpointing else ""
        print(f"{folder.name}: out of memory with a micro-batch of {micro_batch}; trying {smaller}{note}", flush=True)
    distributed.barrier()  # all processes are done with the checkpoints
    rows = source.epoch_length
    return {
        "steps": plan.optim.steps(rows),
        "rows": rows,
        "epochs": plan.optim.steps(rows) * plan.optim.batch_size / rows,
        "processes": distributed.world_size(),
        "resumed_from": resumed_from,
        "micro_batch": micro_batch,
        "gradient_checkpointing": gradient_checkpointing,
        "seconds": round(time.monotonic() - started, 2),
        "threads": torch.get_num_threads(),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def _train(
    plan: TrainingPlan,
    base: LoadedModel,
    source: RolloutSource | OnPolicySource,
    folder: Path,
    on_metrics: Callable[[int, dict[str, float]], None],
    references: Mapping[str, Path],
    microbatch_plan: tuple[int, bool],
    last: Path | None,
) -> None:
    """Trains from the checkpoint `last` to the end and writes the trained weights."""
    # accelerate keeps the precision of the first run in a process; later runs may have another one.
    AcceleratorState._reset_state(reset_partial_state=True)
    with ExitStack() as stack:
        stack.enter_context(preserved(base.model))
        if isinstance(source, OnPolicySource) and source.teacher is not None:
            stack.enter_context(preserved(source.teacher.model))
        bar = ProgressBar(folder.name)
        stall = StallGuard(plan.optim.max_step_minutes, folder / "error.txt" if distributed.is_main() else None)
        callbacks: list[TrainerCallback] = [NonFiniteGuard(), ExplosionGuard(), stall]
        callbacks += [LogFinalStep(), PreemptionCallback()]
        if plan.optim.snapshot_steps:
            callbacks.append(Snapshots(folder / "snapshots", plan.optim.snapshot_steps, plan.identity))
        tracking = weight_tracking(plan.initial_adapter, references) if distributed.is_main() else None
        if tracking is not None:
            callbacks.insert(0, tracking)
        checkpoints = folder / "checkpoints"
        trainer = make_trainer(plan, base, source, checkpoints, callbacks, microbatch_plan=microbatch_plan)
        if tracking is not None:
            trainer.add_callback(bar)
            trainer.add_callback(Metrics(folder / "metrics.jsonl", source.epoch_length, tracking.measure, on_metrics))
        else:
            # All processes start from the same seed, but their dropout masks must differ.
            torch.manual_seed(plan.seed + distributed.rank())
        trainer.add_callback(ChecksumCheckpoint(plan.identity))  # last: it covers what the others have written
        try:
            with preemption.deferred():  # a signal in the middle of a step takes effect after it
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            stall.close()
            bar.close()
        require_finite(trainer.model, trainer.state.global_step)
        if distributed.is_main():
            with atomic_folder(folder / folder_of(trainer.model)) as temporary:
                save_weights(trainer.model, temporary)
            if not changes_weights(trainer.model):
                print(f"{folder.name}: the update is 0: training has not changed the weights", flush=True)
            if isinstance(source, OnPolicySource):
                from losslens.training.on_policy import warn_without_signal

                warn_without_signal(folder)


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])


def _agreed_checkpoint(folder: Path, identity: str) -> Path | None:
    """The `last_checkpoint` found by the main process, broadcast to all."""
    last = last_checkpoint(folder, identity) if distributed.is_main() else None
    name = distributed.broadcast(None if last is None else last.name)
    return None if name is None else folder / name


def last_checkpoint(folder: Path, identity: str) -> Path | None:
    """Returns the latest intact checkpoint of a run, or None.

    Removes the other checkpoints whose names could collide with later ones of this run.

    Args:
        folder: Folder of the checkpoints.
        identity: Fingerprint of the run.
    """
    intact = []
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        # Trainer would not delete a link, when a newer checkpoint replaces it.
        fault = "a link" if checkpoint.is_symlink() else checkpoint_fault(checkpoint, identity)
        if not fault:
            intact.append(checkpoint)
            continue
        print(f"{checkpoint}: {fault}; ignored", flush=True)
        if checkpoint.name.rpartition("-")[2].isdigit():
            remove_entry(checkpoint)
    return max(intact, key=_step_of, default=None)
