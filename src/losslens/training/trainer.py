"""The trainer of every loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from losslens.core.errors import InputError
from losslens.losses import Batch, Loss
from losslens.training.source import RolloutSource
from losslens.training.trl_internals import HEAD, OpenSFTTrainer, use_adapter

# How far the log-probability of a token may be, in the mean, from what it was when the base was scored, in nats. In
# half precision the other rows of a batch move it, by .01 as a rule.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
# From this size on a token counts as pulled at.
_NO_WEIGHT = 1e-6


class LossTrainer(OpenSFTTrainer):
    """TRL's `SFTTrainer` with the loss of LossLens, whatever its unit.

    The loss is Σ of its terms, divided by the completion tokens, rollouts or pairs of the effective batch (over
    accumulation and processes). Prompt tokens never count. The reference is the base: the adapter switched off.

    Args:
        loss: The loss.
        source: Gives what it learns from, step by step.
        **options: As for `SFTTrainer`, but for its datasets and its collator.
    """

    def __init__(self, loss: Loss, source: RolloutSource, **options: Any) -> None:
        self.loss = loss
        self.source = source
        self._step: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._pad_token_id = options["processing_class"].pad_token_id
        args = options["args"]
        numbers = Dataset.from_dict({"number": range(args.max_steps * args.gradient_accumulation_steps)})
        super().__init__(train_dataset=numbers, data_collator=list, **options)

    def get_train_dataloader(self) -> DataLoader:
        """A stand-in by which steps are counted: their micro-batches come from the source."""
        return DataLoader(self.train_dataset)  # draws a seed when it is iterated: LoRA dropout draws after it

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of a step, and how many tokens, rollouts or pairs they hold with those of all processes.

        Raises:
            ValueError: The source gives another number of examples than make a step.
        """
        examples = self.source.batch(self.state.global_step, self.model.get_base_model())
        # A micro-batch goes to each process in turn.
        shape = (num_batches, self.accelerator.num_processes, self.args.per_device_train_batch_size)
        if len(examples) != math.prod(shape):
            raise ValueError(f"the source gives {len(examples)} examples for a step of {math.prod(shape)}")
        shares = np.arange(len(examples)).reshape(shape)[:, self.accelerator.process_index]
        laid_out = (examples.take(numbers).laid_out(self._pad_token_id) for numbers in shares)
        batches, tokens = super().get_batch_samples(laid_out, num_batches, device)
        if self.loss.normaliser == "tokens":
            count = tokens
        else:
            own = sum(len(batch["pairs" if self.loss.normaliser == "pairs" else "input_ids"]) for batch in batches)
            count = self._over_processes(torch.tensor(float(own)))
        if "mismatched_log_ratio" in self.loss.needs:
            others = examples.mismatched()
            mismatched = [
                examples.take(numbers).with_completions_of(examples.take(others[numbers]), self._pad_token_id)
                for numbers in shares
            ]
            self._step["mismatched_log_ratio"] = self._mismatched_log_ratio(mismatched, device)
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch; `return_outputs` is not supported."""
        assert not return_outputs
        assert num_items_in_batch is not None
        outputs = model(**_sequences(inputs), **HEAD)
        reference = inputs.get("reference")
        if reference is None and "reference" in self.loss.needs:
            reference = self.base_logps(inputs)
        batch = Batch(
            logps=outputs.log_probs,
            mask=outputs.label_mask,
            reward=inputs["reward"],
            columns={k.removeprefix("columns/"): v for k, v in inputs.items() if k.startswith("columns/")},
            pairs=inputs.get("pairs"),
            reference=reference,
            step=self._step,
        )
        total = self._summed(batch)
        # Without anything to learn from in the whole batch the loss is 0, and not 0/0.
        loss = total / max(num_items_in_batch, 1)
        [slope] = torch.autograd.grad(total, batch.logps, retain_graph=True)
        self._note(batch, -slope, outputs, inputs["attention_mask"])
        # The gradients are averaged over the processes, and what is divided by was counted over all of them.
        return loss * self.accelerator.num_processes

    def _summed(self, batch: Batch) -> torch.Tensor:
        """The sum of the terms of all tokens, or of all rollouts or pairs with a completion token."""
        terms, scored = self.loss.terms(batch), batch.mask
        if self.loss.unit != "token":
            scored = batch.mask.any(dim=1)
        if batch.pairs is not None:
            scored = scored[batch.pairs].any(dim=1)
        return terms.where(scored, 0).sum()

    @torch.no_grad()
    def base_logps(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The base's log-probabilities of what `batches.sequences` gives, shape (N, T), nats."""
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None):
            return self._logps(inputs)

    @torch.no_grad()
    def _logps(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities without dropout, and so without drawing what it leaves out, shape (N, T), nats."""
        placed = {name: values.to(self.accelerator.device) for name, values in _sequences(inputs).items()}
        training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                return self.model(**placed, **HEAD).log_probs
        finally:
            self.model.train(training)

    def require_base(self, kept: str) -> None:
        """Holds the model, whose adapter is as it begins, against the reference of the first examples.

        Args:
            kept: Where the reference lies, for the message.

        Raises:
            InputError: They differ by more than rounding.
        """
        first = self.source.batch(0, self.model.get_base_model()).take(np.arange(self.args.per_device_train_batch_size))
        inputs = first.laid_out(self._pad_token_id)
        scored = inputs["labels"][:, 1:] != -100
        difference = (
            (self._logps(inputs).cpu() - inputs["reference"])[scored].abs().mean().item() if scored.any() else 0
        )
        dtype = self.accelerator.unwrap_model(self.model).get_base_model().dtype
        tolerance = _HALF_TOLERANCE if dtype in (torch.bfloat16, torch.float16) else _TOLERANCE
        if not difference <= tolerance:
            raise InputError(
                f"{kept}: before the first step the model gives a token another log-probability than the reference, by"
                f" {difference:.3g} nats in the mean (at most {tolerance:g}): it was scored with another precision,"
                " chat template or BOS, or changed since; delete it, and it is scored again"
            )

    @torch.no_grad()
    def _mismatched_log_ratio(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
        """See `Batch.step`; shape ()."""
        total, rows = torch.zeros((), device=device), 0
        for batch in batches:
            total += (self._logps(batch) - self.base_logps(batch)).sum()
            rows += len(batch["input_ids"])
        total, count = self._over_processes(torch.stack([total.cpu(), torch.tensor(float(rows))]))
        return (total / count).to(device)

    def _over_processes(self, values: torch.Tensor) -> torch.Tensor:
        device = self.accelerator.device
        return self.accelerator.reduce(values.to(device), reduction="sum").to("cpu")

    @torch.no_grad()
    def _note(self, batch: Batch, weights: torch.Tensor, outputs: Any, attention_mask: torch.Tensor) -> None:
        """Adds a micro-batch to the numbers of its step; at the end of the step they become metrics.

        All are means over the tokens, rollouts or pairs of the whole step, so that neither the micro-batch nor the
        number of processes moves them.
        """
        logps, mask = batch.logps, batch.mask
        weights = weights.where(mask, 0)  # a sum over a rollout has a slope at padding too
        right = batch.correct[:, None] & mask
        wrong = ~right & mask
        sums = {"tokens": attention_mask.sum(), "weight": weights.abs().sum(), "squared_weight": weights.square().sum()}
        means = {
            "entropy": (outputs.entropy, mask),
            "mean_token_accuracy": (outputs.is_top1, mask),
            "logps/correct": (logps, right),
            "logps/incorrect": (logps, wrong),
            "weight/correct": (weights, right),
            "weight/incorrect": (weights, wrong),
            "weight/zero": (weights.abs() < _NO_WEIGHT, mask),
        }
        if batch.reference is not None:
            ratios, scored = batch.log_ratio / batch.lengths, mask.any(dim=1)
            means["log_ratio/correct"] = (ratios, batch.correct & scored)
            means["log_ratio/incorrect"] = (ratios, ~batch.correct & scored)
        own = self.loss.diagnostics(batch)
        means |= {name: (values, torch.ones_like(values, dtype=torch.bool)) for name, values in own.items()}
        for name, (values, where) in means.items():
            sums[name], sums[f"{name}/n"] = (values * where).sum(), where.sum()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
        if self.accelerator.sync_gradients:
            self._close_the_step(list(means))

    def _close_the_step(self, names: list[str]) -> None:
        sums = dict(zip(self._sums, self._over_processes(torch.stack(list(self._sums.values()))).tolist(), strict=True))
        self._sums = {}
        tokens = sums["entropy/n"]
        metrics = {name: sums[name] / sums[f"{name}/n"] for name in names if sums[f"{name}/n"]}
        if sums["squared_weight"]:
            metrics["weight/effective"] = sums["weight"] ** 2 / (tokens * sums["squared_weight"])
        self.add_metrics({**metrics, "completion_tokens": tokens})
        self.count_tokens(sums["tokens"])

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.add_metrics({"clip/share": float(norm > self.args.max_grad_norm)})
        return norm


def _sequences(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
