"""TRL's own trainers on the rows, in the order and from the initial adapter of a plan, to compare ours with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.losses.kto import Kto
from losslens.losses.rpo import Rpo
from losslens.models.adapters import load_adapter
from losslens.models.loading import LoadedModel
from losslens.training.run import TrainingPlan
from losslens.training.source import data_order


def stock_trainer(
    plan: TrainingPlan,
    base: LoadedModel,
    tokenised: pd.DataFrame,
    folder: Path,
    microbatch_plan: tuple[int, bool] | None = None,
) -> Any:
    """Builds TRL's trainer for SFT, DFT, DPO, RPO, KTO or GRPO.

    Pairs and KTO's rollouts are passed as text where there is one (the column `completion`), pairs otherwise as token
    ids. GRPO reads the frozen rollouts where TRL would sample; its groups are then those of its batch.

    Args:
        plan: The plan; the whole batch is one micro-batch unless `microbatch_plan` is given.
        base: The base; it is modified, so call this within `preserved`.
        tokenised: The rollouts, from `tokenise`.
        folder: Folder for what TRL writes.
        microbatch_plan: Examples per forward pass, and whether to use gradient checkpointing.
    """
    micro_batch, checkpointing = microbatch_plan or (plan.optim.batch_size, False)
    arguments = {
        "output_dir": str(folder),
        "learning_rate": plan.learning_rate,
        "max_steps": plan.optim.max_steps,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": plan.optim.batch_size // micro_batch,
        "lr_scheduler_type": plan.optim.scheduler,
        "warmup_steps": plan.optim.warmup_ratio,
        "weight_decay": plan.optim.weight_decay,
        "max_grad_norm": plan.optim.max_grad_norm,
        "gradient_checkpointing": checkpointing,
        "save_strategy": "no",
        "logging_steps": plan.optim.log_steps,
        "bf16": base.model.dtype == torch.bfloat16,
        "use_cpu": base.model.device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": plan.seed,
    }
    in_order = {"train_sampling_strategy": "sequential", "max_length": None}
    assert plan.lora is not None
    assert plan.initial_adapter is not None
    common = {
        "model": base.model,
        "processing_class": base.tokenizer,
        "peft_config": plan.lora.peft_config(base.model),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer: Any
    if isinstance(plan.method, (Dpo, Rpo)):
        pairs = plan.method.select_pairs(tokenised)
        from_text = "completion" in tokenised
        rows = (_pair_of_texts if from_text else _pair_of_ids)(tokenised, [pairs[i] for i in _order(plan, len(pairs))])
        if from_text:
            rows = [{**row, "prompt": base.tokenizer.decode(row["prompt"])} for row in rows]
        if isinstance(plan.method, Rpo):
            options: dict[str, Any] = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, plan.method.alpha]}
        else:
            options = {"loss_type": [plan.method.loss_type], "ld_alpha": plan.method.ld_alpha}
            # The papers' values; TRL's own default is 0, which it refuses for EXO.
            options["label_smoothing"] = {"exo_pair": 1e-3, "robust": 0.1}.get(plan.method.loss_type, 0.0)
        dpo_config = DPOConfig(**arguments, **in_order, beta=plan.method.beta, **options)
        kind = DPOTrainer if from_text else _DpoOfIds
        trainer = kind(args=dpo_config, train_dataset=Dataset.from_list(rows), **common)
    elif isinstance(plan.method, Kto):
        rows = [
            {
                "prompt": base.tokenizer.decode(tokenised["prompt_ids"].iloc[i]),
                "completion": tokenised["completion"].iloc[i],
                "label": bool(tokenised["reward"].iloc[i]),
            }
            for i in _order(plan, len(tokenised))
        ]
        kto_config = KTOConfig(**arguments, **in_order, beta=plan.method.beta)
        trainer = KTOTrainer(args=kto_config, train_dataset=Dataset.from_list(rows), **common)
    elif isinstance(plan.method, Grpo):
        trainer = _grpo(plan, tokenised, arguments, common)
    else:
        rows = [
            {
                "input_ids": tokenised["prompt_ids"].iloc[i] + tokenised["completion_ids"].iloc[i],
                "labels": [-100] * len(tokenised["prompt_ids"].iloc[i]) + tokenised["completion_ids"].iloc[i],
            }
            for i in _order(plan, len(tokenised))
        ]
        sft_config = SFTConfig(**arguments, **in_order, loss_type="dft" if plan.method.name == "dft" else "nll")
        trainer = SFTTrainer(args=sft_config, train_dataset=Dataset.from_list(rows), **common)
    trainer.remove_callback(PrinterCallback)
    load_adapter(trainer.model, plan.initial_adapter)
    return trainer


def _order(plan: TrainingPlan, examples: int) -> list[int]:
    """Returns the example numbers of all steps, as `FrozenSource` draws them."""
    order: list[int] = data_order(examples, plan.optim.max_steps * plan.optim.batch_size, plan.seed).tolist()
    return order


class _DpoOfIds(DPOTrainer):
    """`DPOTrainer` on token ids, which need not be those of any text."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def _pair_of_ids(tokenised: pd.DataFrame, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    prompts, completions = tokenised["prompt_ids"], tokenised["completion_ids"]
    return [
        {"prompt_ids": prompts.iloc[c], "chosen_ids": completions.iloc[c], "rejected_ids": completions.iloc[r]}
        for c, r in pairs
    ]


def _pair_of_texts(tokenised: pd.DataFrame, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    prompts, texts = tokenised["prompt_ids"], tokenised["completion"]
    return [{"prompt": prompts.iloc[c], "chosen": texts.iloc[c], "rejected": texts.iloc[r]} for c, r in pairs]


def _grpo(plan: TrainingPlan, tokenised: pd.DataFrame, arguments: dict[str, Any], common: dict[str, Any]) -> Any:
    order, size = _order(plan, len(tokenised)), plan.optim.batch_size

    def rollouts(prompts: list[str], trainer: Any) -> dict[str, Any]:
        rows = order[trainer.state.global_step * size :][: len(prompts)]
        return {
            "prompt_ids": [list(tokenised["prompt_ids"].iloc[row]) for row in rows],
            "completion_ids": [list(tokenised["completion_ids"].iloc[row]) for row in rows],
            "logprobs": None,
        }

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(number % 2) for number in range(len(completions))]  # of unequal rewards, whatever the order

    config = GRPOConfig(
        **arguments,
        num_generations=2,
        steps_per_generation=arguments["gradient_accumulation_steps"],
        max_completion_length=int(tokenised["completion_ids"].map(len).max()),
    )
    prompts = Dataset.from_list([{"prompt": str(number)} for number in range(max(size, 2))])
    return GRPOTrainer(args=config, reward_funcs=reward, rollout_func=rollouts, train_dataset=prompts, **common)
