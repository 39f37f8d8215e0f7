"""TRL's on-policy trainers, opened for `on_policy`: like `trl_internals`, this uses undocumented parts of TRL 1.16.

A module of its own, since TRL 1.15 does not have all of this; it is imported only by runs that sample for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig
from trl import DistillationTrainer, GRPOTrainer

from losslens.models.trained_weights import causal_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    # At run time either of the two trainers stands behind this class.
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object


class OpenSampler(_Trainer):
    """Part of a trainer that samples a step's completions when it begins, common to both.

    What is sampled in a step follows from `seed`, the step, the process and the policy, whatever the state of the
    global generators, so that a resumed run meets the same rest.

    Attributes:
        inputs: Rows of the training dataset that the current completions answer.
        tokens: Tokens of prompts and completions since training began or was resumed, over all processes.
    """

    def open_sampling(self, end_ids: Sequence[int], seed: int) -> None:
        """Sets the tokens that end a completion, and the seed of the samples; call it once."""
        self.inputs: Sequence[Mapping[str, Any]] = ()
        self.tokens = 0.0
        self._own: dict[str, list[float]] = {}
        self.end_ids, self.sampling_seed = list(end_ids), seed
        self.eos_token_ids = self.end_ids
        if self.use_vllm:
            # vLLM knows the model's end tokens, but not those of the chat template.
            self.vllm_generation.generation_kwargs["stop_token_ids"] = self.end_ids
        else:
            self.generation_kwargs["eos_token_id"] = self.end_ids
            self.generation_config = GenerationConfig(**self.generation_kwargs, disable_compile=True)

    def encode(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt."""
        raise NotImplementedError

    def seeds(self) -> list[int]:
        """Returns what determines the samples of the current step, besides the policy."""
        return [self.sampling_seed, self.state.global_step, self.accelerator.process_index]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Does nothing: TRL would write a model card into each (temporary) checkpoint."""

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics of a step to those averaged until the next logged step."""
        for name, value in metrics.items():
            self._own.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs the metrics of `add_metrics` and the entropy instead of TRL's, which have other names."""
        metrics = self._metrics["train"]
        kept = {"entropy": metrics["entropy"], "num_tokens": [self.tokens], **self._own}
        metrics.clear()
        metrics.update(kept if "loss" in logs else {})
        if "loss" in logs:
            self._own.clear()
        super().log(logs, start_time)

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return [self.encode(prompt) for prompt in prompts], None, {}

    def _prepare_inputs(self, batch: Any) -> Any:
        cuda = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(int(np.random.SeedSequence(self.seeds()).generate_state(1, np.uint64)[0]))
            return super()._prepare_inputs(batch)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.inputs = inputs
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        return output

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_sampler():
            return super()._generate_single_turn(*args, **kwargs)

    @contextmanager
    def _as_sampler(self) -> Iterator[None]:
        """Switches off dropout, and the model's own settings, which `generate` uses for what TRL leaves unset."""
        training, model = self.model.training, causal_model(self.model)
        own, model.generation_config = model.generation_config, GenerationConfig()
        self.model.eval()
        try:
            yield
        finally:
            model.generation_config = own
            self.model.train(training)

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.add_metrics({"clip/share": float(norm > self.args.max_grad_norm)})
        return norm


class OpenGRPOTrainer(OpenSampler, GRPOTrainer):
    """TRL's `GRPOTrainer`, with the samples of a step open to subclasses."""

    def sampled(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the samples to train on, as many as were sampled, each with `prompt_ids`, `ids` and `logps`.

        Args:
            samples: The samples of `inputs`, in their order.
        """
        raise NotImplementedError

    def left_out(self) -> Sequence[bool]:
        """Returns for each sample of this process whether it is left out of the loss."""
        raise NotImplementedError

    def sample(self, prompts: list[str]) -> list[dict[str, Any]]:
        """Samples a completion of each prompt; repeated prompts are groups, as in `inputs`."""
        prompt_ids, ids, _, _, logps, *_ = super()._generate(prompts)
        logps = [None] * len(ids) if logps is None else logps
        return [
            {"prompt_ids": prompt, "ids": completion, "logps": values}
            for prompt, completion, values in zip(prompt_ids, ids, logps, strict=True)
        ]

    def _generate(self, prompts: list[str]) -> Any:
        samples = self.sampled(self.sample(prompts))
        prompt_ids, ids, logps = ([sample[name] for sample in samples] for name in ("prompt_ids", "ids", "logps"))
        # TRL decodes completions for reward models and logs; our rewards are known already.
        return prompt_ids, ids, None, [""] * len(ids), None if logps[0] is None else logps, {}, None, []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        left_out = torch.tensor(list(self.left_out()), device=self.accelerator.device)
        # As TRL does with truncated completions.
        output["completion_mask"] = output["completion_mask"] * (~left_out).unsqueeze(1).int()
        output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        return output


class OpenDistillationTrainer(OpenSampler, DistillationTrainer):
    """TRL's `DistillationTrainer`, with the samples of a step open to subclasses."""

    def sampled(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Takes note of the samples of `inputs`, in their order."""
        raise NotImplementedError

    def _generate(self, prompts: list[str]) -> Any:
        prompt_ids, ids, *rest = super()._generate(prompts)
        pairs = zip(prompt_ids, ids, strict=True)
        self.sampled([{"prompt_ids": prompt, "ids": completion} for prompt, completion in pairs])
        return prompt_ids, ids, *rest
