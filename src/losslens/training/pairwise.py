"""The trainer of every loss on pairs of a right and a wrong rollout."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from losslens.methods import Pairwise


class PairwiseTrainer(DPOTrainer):
    """TRL's `DPOTrainer` on pre-tokenised pairs, with the loss of a `Pairwise` method.

    The reference is the base: the adapter switched off. TRL's other losses (`loss_type`) run as TRL has them.

    Args:
        method: The loss.
        **options: As for `DPOTrainer`; the dataset holds `prompt_ids`, `chosen_ids` and `rejected_ids`.
    """

    def __init__(self, method: Pairwise, **options: Any) -> None:
        self.method = method
        super().__init__(**options)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.loss_types != ["sigmoid"]:
            return super()._compute_loss(model, inputs, return_outputs)
        # DPO itself is not left to TRL, so that what runs is the function that `methods/dpo.py` states and tests.
        assert not return_outputs
        mask = inputs["completion_mask"]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        reference_chosen, reference_rejected = self.compute_ref_log_probs(model, inputs)
        losses = self.method.loss(chosen, rejected, reference_chosen, reference_rejected)
        # A pair without a completion token says nothing: 0, where the formula has −log σ(0).
        losses = losses * mask.any(dim=1).view(2, -1).any(dim=0)
        loss = losses.mean()

        metrics = self._metrics["train"]
        with torch.no_grad():
            chosen_rewards = self.beta * (chosen - reference_chosen)
            rejected_rewards = self.beta * (rejected - reference_rejected)
            margins = chosen_rewards - rejected_rewards
            means = {
                "rewards/chosen": chosen_rewards,
                "rewards/rejected": rejected_rewards,
                "rewards/margins": margins,
                "rewards/accuracies": (margins > 0).float(),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
            sums = (outputs.entropy.sum(), outputs.label_mask.sum(), inputs["attention_mask"].sum())
            values = torch.stack([value.double() for value in (*sums, *(value.mean() for value in means.values()))])
            values = self.accelerator.reduce(values, reduction="sum")  # over all processes
            entropy, scored, tokens = values[:3]
            if scored:
                metrics["entropy"].append((entropy.float() / scored.float()).item())
            # All have as many pairs.
            for name, value in zip(means, values[3:] / self.accelerator.num_processes, strict=True):
                metrics[name].append(value.item())
            metrics["completion_tokens"].append(scored.item())
        self._total_train_tokens += tokens.item()
        metrics["num_tokens"] = [self._total_train_tokens]
        return loss
