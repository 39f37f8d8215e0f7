"""Per-token log-probabilities on the CPU without the full logits."""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers import PreTrainedModel

from losslens.training.trl_internals import FusedCausalLMOutput

# Names under which architectures keep what TRL's fused head does to the logits and this one does not.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the head's output as it is, neither scaled nor capped (as Granite's and Gemma 2's are)."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1.0) for name in _LOGIT_CHANGES)


def score_selected_positions(model: PreTrainedModel) -> None:
    """Makes `model(…, labels=…, fused_lm_head=True)` put only the labelled positions through the language-model head.

    TRL's fused head answers to the same call. On CUDA it is the better one; without Triton it puts every position,
    prompt and padding included, through the head, and computes each tile again in the backward pass.

    Args:
        model: The causal language model inside the PEFT model, with a plain head; its `forward` is replaced.
    """
    plain_forward = type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(self, *args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        logits = self.get_output_embeddings()(hidden[mask]).float()
        log_probs = logits.log_softmax(dim=-1)
        targets = labels[mask]
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            is_top1 = logits.argmax(dim=-1) == targets

        def unselected(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            log_probs=unselected(log_probs.gather(-1, targets[:, None]).squeeze(-1)),
            entropy=unselected(entropy),
            mean_logits=unselected(logits.detach().mean(dim=-1)),
            is_top1=unselected(is_top1),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)
