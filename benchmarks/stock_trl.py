"""One training run as a researcher writes it with stock TRL: the counterpart of a run of `train.py`.

    python benchmarks/stock_trl.py METHOD MODEL ROLLOUTS.jsonl STEPS BATCH

TRL has no RIFT and no offline GRPO. Like the others they weigh the tokens of single rollouts, so SFT stands for them:
`rft` is SFT on correct rollouts, `rift` and `grpo` are SFT on all. Rows, steps, batch, adapter, optimiser and schedule
are those of `train.py`; gradient checkpointing, which TRL switches on by default and which costs time, is off.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any


def pairs_of(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns a pair for each prompt with a correct and an incorrect rollout."""
    pairs = []
    for prompt, group in groupby(rows, lambda row: row["prompt"]):
        by_reward: dict[bool, list[str]] = {True: [], False: []}
        for row in group:
            by_reward[row["reward"] > 0].append(row["completion"])
        for chosen, rejected in zip(by_reward[True], by_reward[False], strict=False):
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def main() -> None:
    """Trains, and writes the adapter to a temporary folder."""
    method, model, file, steps, batch = sys.argv[1:]
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": int(steps), "per_device_train_batch_size": int(batch),
            "max_length": None, "learning_rate": 5e-6 if method == "dpo" else 1e-4, "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05, "weight_decay": 0.01, "gradient_checkpointing": False, "use_cpu": True,
            "save_strategy": "no", "report_to": "none", "logging_steps": 5, "disable_tqdm": True,
        }  # fmt: skip
        given: dict[str, Any] = {
            "model": AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
            "processing_class": AutoTokenizer.from_pretrained(model),
            "peft_config": lora,
        }
        if method == "dpo":
            data = Dataset.from_list(pairs_of(rows))
            trainer = DPOTrainer(args=DPOConfig(**common, beta=0.1), train_dataset=data, **given)
        else:
            kept = [row for row in rows if method != "rft" or row["reward"] > 0]
            data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in kept])
            loss = {"loss_type": "dft"} if method == "dft" else {}
            trainer = SFTTrainer(
                args=SFTConfig(**common, completion_only_loss=True, **loss), train_dataset=data, **given
            )
        trainer.train()
        trainer.save_model(folder)


if __name__ == "__main__":
    main()
