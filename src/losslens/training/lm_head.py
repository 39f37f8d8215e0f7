"""Per-token log-probabilities without materialising the full logits, for devices without TRL's fused kernel."""

from __future__ import annotations

import types
from typing import Any

import torch
from transformers import PreTrainedModel

from losslens.training.trl_internals import FusedCausalLMOutput

# Configuration fields of logit transformations, which TRL's fused head applies and this one does not.
_LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


def has_plain_head(model: PreTrainedModel) -> bool:
    """Returns True if the logits are the unmodified output of the head: not scaled (Granite) or capped (Gemma 2)."""
    config = model.config.get_text_config()
    return all(getattr(config, name, None) in (None, 1.0) for name in _LOGIT_TRANSFORMS)


def score_selected_positions(model: PreTrainedModel, temperature: float = 1.0) -> None:
    """Makes `model(…, labels=…, fused_lm_head=True)` apply the language-model head at labelled positions only.

    TRL's fused head has the same interface. It is preferable on CUDA, but without Triton it processes every position,
    including prompt and padding, and recomputes each tile in the backward pass.

    Args:
        model: The causal language model inside the PEFT model, with a plain head; its `forward` is replaced.
        temperature: Softmax temperature of the scored distributions.
    """
    plain_forward = type(model).forward

    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(self, *args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != -100
        logits = self.get_output_embeddings()(hidden[mask]).float()
        if temperature != 1.0:
            logits = logits / temperature
        log_probs = logits.log_softmax(dim=-1)
        targets = labels[mask]
        with torch.no_grad():
            entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
            is_top1 = logits.argmax(dim=-1) == targets

        def scatter(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        return FusedCausalLMOutput(
            log_probs=scatter(log_probs.gather(-1, targets[:, None]).squeeze(-1)),
            entropy=scatter(entropy),
            mean_logits=scatter(logits.detach().mean(dim=-1)),
            is_top1=scatter(is_top1),
            label_mask=mask,
        )

    model.forward = types.MethodType(forward, model)
