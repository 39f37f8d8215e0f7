"""The trainer of every loss that is a sum over the tokens of single rollouts."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import use_adapter

from losslens.methods import Pointwise, Scored

_PER_ROLLOUT = {"reward": torch.float32, "advantage": torch.float32, "group": torch.long}


class _Collator(DataCollatorForLanguageModeling):
    """TRL's collator, with the columns that hold one number a rollout stacked beside the padded tokens."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        for name, dtype in _PER_ROLLOUT.items():
            batch[name] = torch.tensor([example[name] for example in examples], dtype=dtype)
        return batch


class PointwiseTrainer(SFTTrainer):
    """TRL's `SFTTrainer` with the loss of a `Pointwise` method.

    The loss is Σ of the method's terms over all completion tokens, divided by the number of completion tokens of the
    effective batch (over accumulation and processes), whatever their weight. Prompt tokens never count.

    Args:
        method: The loss.
        **options: As for `SFTTrainer`; the dataset is tokenised (`input_ids`, `labels`, reward, advantage, group).
    """

    # `compute_loss` divides by the tokens of the effective batch itself.
    loss_is_scaled_for_ga = True

    def __init__(self, method: Pointwise, **options: Any) -> None:
        self.method = method
        pad_token_id = options["processing_class"].pad_token_id
        super().__init__(data_collator=_Collator(pad_token_id), **options)
        # Otherwise the tokens of the effective batch are counted only for models whose forward takes any keyword.
        self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", *_PER_ROLLOUT]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's loss of one micro-batch; `return_outputs` is not supported."""
        assert not return_outputs
        assert num_items_in_batch is not None
        per_rollout = {name: inputs.pop(name) for name in _PER_ROLLOUT}
        tokens = {**inputs, "use_cache": False, "fused_lm_head": True}
        outputs = model(**tokens)
        scored = Scored(
            logps=outputs.log_probs,
            mask=outputs.label_mask,
            reference_logps=self._reference(tokens) if self.method.needs_reference else None,
            **per_rollout,
        )
        total = self.method.loss(scored).sum()
        # Without a completion token in the whole batch there is nothing to learn from it: 0, and not 0/0.
        loss = total / max(num_items_in_batch, 1)
        # How hard, and which way, the loss pulls at each token: −∂(Σ of the terms)/∂log π, shape (N, T).
        [slope] = torch.autograd.grad(total, scored.logps, retain_graph=True)
        self._note(scored, -slope, outputs, inputs["attention_mask"])
        # The gradients are averaged over the processes, and the tokens were counted over all of them.
        return loss * self.accelerator.num_processes

    def _reference(self, tokens: dict[str, Any]) -> torch.Tensor:
        with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self.model(**tokens).log_probs

    @torch.no_grad()
    def _note(self, scored: Scored, weights: torch.Tensor, outputs: Any, attention_mask: torch.Tensor) -> None:
        """Notes the metrics of a micro-batch of all processes, each as a mean over its own tokens or rollouts."""
        metrics = self._metrics["train"]
        right = (scored.reward > 0)[:, None] & scored.mask
        wrong = ~right & scored.mask
        means = (
            ("entropy", outputs.entropy, scored.mask),
            ("mean_token_accuracy", outputs.is_top1, scored.mask),
            ("logps/right", scored.logps, right),
            ("logps/wrong", scored.logps, wrong),
            ("weight/right", weights, right),
            ("weight/wrong", weights, wrong),
        )
        sums = [part for _, value, where in means for part in ((value * where).sum(), where.sum())]
        own = torch.stack([part.double() for part in (*sums, attention_mask.sum())])
        *of_all, tokens = self.accelerator.reduce(own, reduction="sum").tolist()
        for (name, _, _), total, number in zip(means, of_all[::2], of_all[1::2], strict=True):
            if number:
                metrics[name].append(total / number)
        metrics["completion_tokens"].append(of_all[1])
        self._total_train_tokens += tokens
        metrics["num_tokens"] = [self._total_train_tokens]
