"""The trainer that all losses share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from losslens.core.errors import InputError
from losslens.losses import Batch, Loss
from losslens.models.trained_weights import as_base, causal_model
from losslens.training.batches import Examples, split_by_length
from losslens.training.distributions import NEEDS, captured_hidden_states, divergence, top_entropy
from losslens.training.source import RolloutSource
from losslens.training.trl_internals import HEAD, OpenSFTTrainer

# Allowed mean absolute difference of a token's log-probability from its saved reference, in nats. In half precision it
# depends on the other rows of a batch, typically by 0.01.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1
# Weights below this absolute value count as zero.
_ZERO_WEIGHT = 1e-6


class LossTrainer(OpenSFTTrainer):
    """TRL's `SFTTrainer` with a LossLens loss of any unit.

    The loss is the sum of its terms divided by the number of completion tokens, rollouts or pairs in the effective
    batch (over accumulation steps and processes). Prompt tokens never count. The reference is the base, that is, the
    model with the adapter disabled or, after full fine-tuning, with the base's weights.

    Args:
        loss: The loss.
        source: Source of the examples of each step.
        by_length: Lay the examples of a step into micro-batches by length; otherwise in their order.
        **options: Options of `SFTTrainer`, except datasets and collator.

    Attributes:
        step_statistics: `Batch.step` of the current step.
    """

    def __init__(self, loss: Loss, source: RolloutSource, by_length: bool, **options: Any) -> None:
        self.loss = loss
        self.source = source
        self.by_length = by_length
        self.step_statistics: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._pad_token_id = options["processing_class"].pad_token_id
        args = options["args"]
        numbers = Dataset.from_dict({"number": range(args.max_steps * args.gradient_accumulation_steps)})
        super().__init__(train_dataset=numbers, data_collator=list, **options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns a placeholder that only counts steps; the micro-batches come from the source."""
        # Iterating it draws a seed from the global generator, before LoRA dropout does: kept for reproducibility.
        return DataLoader(self.train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Returns the micro-batches of a step, and its number of tokens, rollouts or pairs over all processes.

        Raises:
            ValueError: The source returned the wrong number of examples.
        """
        examples = self.source.batch(self.state.global_step, causal_model(self.model))
        own_indices = self._own_indices(examples, num_batches)
        collated = (examples.take(indices).collate(self._pad_token_id) for indices in own_indices)
        batches, tokens = super().get_batch_samples(collated, num_batches, device)
        if self.loss.divisor == "tokens":
            count = tokens
        else:
            own = sum(len(batch["pairs" if self.loss.divisor == "pairs" else "input_ids"]) for batch in batches)
            count = self._over_processes(torch.tensor(float(own)))
        if "mismatched_log_ratio" in self.loss.needs:
            others = examples.mismatched()
            mismatched = [
                examples.take(indices).with_completions_of(examples.take(others[indices]), self._pad_token_id)
                for indices in own_indices
            ]
            self.step_statistics["mismatched_log_ratio"] = self._mismatched_log_ratio(mismatched, device)
        return batches, count

    def _own_indices(self, examples: Examples, num_batches: int) -> Sequence[np.ndarray]:
        """Returns the examples of each micro-batch of this process.

        By length, the processes take turns at the step's examples, the longest first, so that all have about as much to
        do. In order, they take turns at the micro-batches.
        """
        shape = (num_batches, self.accelerator.num_processes, self.args.per_device_train_batch_size)
        if len(examples) != math.prod(shape):
            raise ValueError(
                f"source.batch returned {len(examples)} examples; optim.batch_size={math.prod(shape)} are required"
            )
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        if not self.by_length:
            own: np.ndarray = np.arange(len(examples)).reshape(shape)[:, rank]
            return list(own)
        dealt = np.sort(np.argsort(-examples.lengths, kind="stable")[rank::count])
        return [dealt[part] for part in split_by_length(examples.lengths[dealt], num_batches)]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of one micro-batch; `return_outputs` is not supported."""
        assert not return_outputs
        assert num_items_in_batch is not None
        outputs, distributions = self._scored(model, inputs)
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
            sampler=inputs.get("sampler"),
            step=self.step_statistics,
            **distributions,
        )
        total = self._summed(batch)
        # A batch without completion tokens has loss 0, not 0/0.
        loss = total / max(num_items_in_batch, 1)
        [gradient] = torch.autograd.grad(total, batch.logps, retain_graph=True)
        self._accumulate_metrics(batch, -gradient, outputs, inputs["attention_mask"])
        # Gradients are averaged over the processes, but the divisor was summed over them.
        return loss * self.accelerator.num_processes

    def _scored(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
        """Returns the output of the head, and the fields of `Batch` that are of whole next-token distributions."""
        needs = self.loss.needs & NEEDS
        if not needs:
            return model(**_sequences(inputs), **HEAD), {}
        mask = inputs["labels"][:, 1:] != -100
        base_hidden = self._base_hidden_states(inputs)[:, :-1][mask] if "divergence" in needs else None
        policy = causal_model(self.accelerator.unwrap_model(self.model))
        with captured_hidden_states(policy) as states:
            outputs = model(**_sequences(inputs), **HEAD)
        hidden, head = states[0][:, :-1][mask], policy.get_output_embeddings()
        found = {}
        with self.accelerator.autocast():
            if "top_entropy" in needs:
                found["top_entropy"] = top_entropy(head, hidden)
            if base_hidden is not None:
                found["divergence"] = divergence(head, hidden, base_hidden)
        return outputs, {
            name: values.new_zeros(mask.shape).masked_scatter(mask, values) for name, values in found.items()
        }

    def _summed(self, batch: Batch) -> torch.Tensor:
        """Sums the terms over all completion tokens, or over all rollouts or pairs with a completion token."""
        terms, scored = self.loss.terms(batch), batch.mask
        if self.loss.unit != "token":
            scored = batch.mask.any(dim=1)
        if batch.pairs is not None:
            scored = scored[batch.pairs].any(dim=1)
        return terms.where(scored, 0).sum()

    @torch.no_grad()
    def base_logps(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Computes the base's log-probabilities of a batch from `batches.sequences`, shape (N, T), nats."""
        with as_base(self.accelerator.unwrap_model(self.model)):
            return self._logps(inputs)

    @torch.no_grad()
    def _base_hidden_states(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Last hidden states of the base, shape (N, T + 1, H)."""
        model = self.accelerator.unwrap_model(self.model)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with as_base(model), self._inference():
            states: torch.Tensor = causal_model(model).base_model(**tokens, use_cache=False).last_hidden_state
            return states

    @torch.no_grad()
    def _logps(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities without dropout, shape (N, T), nats."""
        placed = {name: values.to(self.accelerator.device) for name, values in _sequences(inputs).items()}
        with self._inference():
            logps: torch.Tensor = self.model(**placed, **HEAD).log_probs
            return logps

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Turns dropout off within the block, which also leaves the random generators unchanged."""
        training = self.model.training
        self.model.eval()
        try:
            with self.accelerator.autocast():
                yield
        finally:
            self.model.train(training)

    def require_base(self, file: str) -> None:
        """Checks that the initial model agrees with the reference log-probabilities of the first examples.

        Args:
            file: File of the reference, for the error message.

        Raises:
            InputError: They differ by more than rounding.
        """
        first = self.source.batch(0, causal_model(self.model)).take(np.arange(self.args.per_device_train_batch_size))
        inputs = first.collate(self._pad_token_id)
        scored = inputs["labels"][:, 1:] != -100
        difference = (
            (self._logps(inputs).cpu() - inputs["reference"])[scored].abs().mean().item() if scored.any() else 0
        )
        tolerance = _HALF_TOLERANCE if self.args.bf16 or self.args.fp16 else _TOLERANCE
        if not difference <= tolerance:
            raise InputError(
                f"{file}: the reference log-probabilities differ from those of the initial model by {difference:.3g}"
                f" nats per token on average (at most {tolerance:g}): they were computed with another precision, chat"
                " template or BOS token, or the file has changed; delete it to compute them again"
            )

    @torch.no_grad()
    def _mismatched_log_ratio(self, batches: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
        """See `Batch.step`; shape ()."""
        total, rows = torch.zeros((), device=device), 0
        for batch in batches:
            total += (self._logps(batch) - self.base_logps(batch)).sum()
            rows += len(batch["input_ids"])
        summed, count = self._over_processes(torch.stack([total.cpu(), torch.tensor(float(rows))]))
        return torch.div(summed, count).to(device)

    def _over_processes(self, values: torch.Tensor) -> torch.Tensor:
        device = self.accelerator.device
        reduced: torch.Tensor = self.accelerator.reduce(values.to(device), reduction="sum")
        return reduced.to("cpu")

    @torch.no_grad()
    def _accumulate_metrics(
        self, batch: Batch, weights: torch.Tensor, outputs: Any, attention_mask: torch.Tensor
    ) -> None:
        """Adds a micro-batch to the sums of its step, and reports the metrics at the end of the step.

        All metrics are means over the tokens, rollouts or pairs of the whole step, so that they depend neither on the
        micro-batch nor on the number of processes.
        """
        logps, mask = batch.logps, batch.mask
        weights = weights.where(mask, 0)  # a sum over a rollout has a gradient at padding, too
        correct = batch.correct[:, None] & mask
        incorrect = ~correct & mask
        sums = {"tokens": attention_mask.sum(), "weight": weights.abs().sum(), "squared_weight": weights.square().sum()}
        means = {
            "entropy": (outputs.entropy, mask),
            "mean_token_accuracy": (outputs.is_top1, mask),
            "logps/correct": (logps, correct),
            "logps/incorrect": (logps, incorrect),
            "weight/correct": (weights, correct),
            "weight/incorrect": (weights, incorrect),
            "weight/zero": (weights.abs() < _ZERO_WEIGHT, mask),
        }
        if batch.reference is not None:
            ratios, scored = batch.log_ratio / batch.lengths, mask.any(dim=1)
            means["log_ratio/correct"] = (ratios, batch.correct & scored)
            means["log_ratio/incorrect"] = (ratios, ~batch.correct & scored)
        diagnostics = self.loss.diagnostics(batch)
        means |= {name: (values, torch.ones_like(values, dtype=torch.bool)) for name, values in diagnostics.items()}
        for name, (values, counted) in means.items():
            sums[name], sums[f"{name}/n"] = (values * counted).sum(), counted.sum()
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value.double()
        if self.accelerator.sync_gradients:
            self._report_metrics(list(means))

    def _report_metrics(self, names: list[str]) -> None:
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
