"""On-policy training: TRL's trainers with our prompts, verifier, initial adapter and metrics."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import DistillationConfig, GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from losslens.core import distributed
from losslens.losses.online_grpo import OnlineGrpo
from losslens.models.tokens import decode, encode_prompt
from losslens.models.trained_weights import causal_model
from losslens.sampling.local import end_ids
from losslens.training.source import OnPolicySource
from losslens.training.trl_on_policy import OpenDistillationTrainer, OpenGRPOTrainer, OpenSampler


def config_and_trainer(
    source: OnPolicySource, arguments: dict[str, Any], on_cuda: bool
) -> tuple[GRPOConfig | DistillationConfig, Callable[..., Any]]:
    """Returns TRL's configuration for an on-policy method, and a function that builds the trainer from it.

    Args:
        source: Problems and method.
        arguments: The training arguments that all methods share.
        on_cuda: True if the policy is on CUDA.
    """
    method, seed = source.method, arguments["seed"]
    share = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    numbers = source.order(arguments["max_steps"], share * distributed.world_size(), seed)
    prompts = [source.problems[number].prompt for number in numbers]
    dataset = Dataset.from_dict({"prompt": prompts, "number": numbers})
    arguments = arguments | {
        "temperature": method.temperature,
        "max_completion_length": source.max_tokens,
        "shuffle_dataset": False,  # the rows are in their order
        "use_vllm": method.vllm == "auto" and on_cuda and importlib.util.find_spec("vllm") is not None,
        "vllm_mode": "colocate",
    }
    if isinstance(method, OnlineGrpo):
        return _grpo_config(method, arguments), partial(OnlineGrpoTrainer, source, train_dataset=dataset)
    return DistillationConfig(**arguments, beta=1.0), partial(OpdTrainer, source, train_dataset=dataset)


def _grpo_config(method: OnlineGrpo, arguments: dict[str, Any]) -> GRPOConfig:
    dapo = method.recipe == "dapo"
    return GRPOConfig(
        **arguments,
        num_generations=method.samples_per_prompt,
        num_iterations=1,
        loss_type="dapo" if dapo else "grpo",
        scale_rewards=method.scale_rewards,
        beta=method.kl_coef,
        use_bias_correction_kl=False,  # TRL's default multiplies the term by ρ, which changes its gradient at ρ = 1
        mask_truncated_completions=dapo,
    )


NO_SIGNAL = "nothing to learn from the rewards"


def warn_without_signal(folder: Path) -> None:
    """Prints that no step of a run had a group with both outcomes, if that is so by its `metrics.jsonl`.

    Each logged value is the mean over the steps since the one before, so all of them are 0 only if all steps' are.
    """
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shares = [json.loads(line).get("train/mixed_groups") for line in lines]
    if shares and all(share == 0 for share in shares):
        rewards = [json.loads(line).get("train/reward", 0.0) for line in lines]
        print(
            f"{folder.name}: {NO_SIGNAL} in any step: no group had both correct and incorrect samples "
            f"({sum(rewards) / len(rewards):.0%} of the samples were correct); choose easier or harder problems, or a "
            "larger method.samples_per_prompt",
            flush=True,
        )


class _Verified(OpenSampler):
    """Verification and metrics of the samples of each step."""

    source: OnPolicySource
    warned = False

    def encode(self, prompt: str) -> list[int]:
        """Returns the token ids of a prompt, rendered as in all other runs."""
        return encode_prompt(self.processing_class, prompt)

    def verify(self, samples: list[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Adds `number`, `finished` and `correct` to samples of the problems with these numbers."""
        ends = set(self.end_ids)
        finished = [sample["ids"][-1] in ends for sample in samples]
        texts = [
            decode(self.processing_class, sample["ids"][:-1] if ended else sample["ids"])
            for sample, ended in zip(samples, finished, strict=True)
        ]
        correct = self.source.correct(numbers, texts)
        return [
            {**sample, "number": number, "finished": ended, "correct": right}
            for sample, number, ended, right in zip(samples, numbers, finished, correct, strict=True)
        ]

    def take_note(self, samples: list[dict[str, Any]], **further: float) -> None:
        """Reports the metrics of all samples of a step: means over the samples or groups of all processes."""
        groups = groups_of(samples, self.source.method.group_size)
        sums = torch.tensor(
            [
                len(samples), len(groups),
                sum(len(sample["prompt_ids"]) + len(sample["ids"]) for sample in samples),
                sum(sample["correct"] for sample in samples), sum(map(is_mixed, groups)),
                sum(len(sample["ids"]) for sample in samples), sum(not sample["finished"] for sample in samples),
                *further.values(),
            ],
            dtype=torch.float32, device=self.accelerator.device,
        )  # fmt: skip
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        count, of_groups, tokens, correct, mixed, length, truncated, *rest = sums
        self.tokens += tokens
        metrics = {"reward": correct / count, "completion_length": length / count, "truncated": truncated / count}
        if self.source.method.group_size > 1:
            metrics["mixed_groups"] = mixed / of_groups
            self._warn_without_signal(mixed, of_groups, correct / count)
        processes = self.accelerator.num_processes
        self.add_metrics(metrics | {name: value / processes for name, value in zip(further, rest, strict=True)})

    def _warn_without_signal(self, mixed: float, groups: float, pass_rate: float) -> None:
        """Prints once per training that a step has no group with both outcomes, so that all advantages are 0."""
        if not mixed and not self.warned and self.accelerator.is_main_process:
            self.warned = True
            print(
                f"{NO_SIGNAL} in step {self.state.global_step + 1}: none of its {groups:.0f} groups has both correct "
                f"and incorrect samples ({pass_rate:.0%} of the samples are correct); for later steps see "
                "train/mixed_groups",
                flush=True,
            )


class OnlineGrpoTrainer(_Verified, OpenGRPOTrainer):
    """TRL's `GRPOTrainer` with verified rewards and, for DAPO, dynamic sampling and overlong punishment.

    Args:
        source: Problems and method.
        **options: Options of `GRPOTrainer`, except reward functions.
    """

    def __init__(self, source: OnPolicySource, **options: Any) -> None:
        assert isinstance(source.method, OnlineGrpo)
        self.source, self.method = source, source.method
        self.samples: list[dict[str, Any]] = []
        rewards: list[Any] = [self.correct]
        if self.method.recipe == "dapo":
            cache = round(self.method.overlong_share * source.max_tokens)
            rewards.append(get_soft_overlong_punishment(source.max_tokens, cache))
        super().__init__(reward_funcs=rewards, **options)
        self.open_sampling(end_ids(causal_model(self.model), self.processing_class), self.args.seed)

    def correct(self, **_: Any) -> list[float]:
        """Reward of the samples to train on: 1 if correct, else 0."""
        return [float(sample["correct"]) for sample in self.samples]

    def sampled(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Verifies the samples; for DAPO, samples other prompts in place of groups with equal outcomes.

        A round samples as many groups as the process has, since all processes must take part; groups that are not
        needed are dropped. After the last round, groups with equal outcomes stay and are left out of the loss.
        """
        size = self.method.samples_per_prompt
        everything = self.verify(samples, [row["number"] for row in self.inputs])
        groups = groups_of(everything, size)
        rounds = 1
        if self.method.recipe == "dapo":
            while rounds <= self.method.resamples and self._over_processes(sum(not is_mixed(g) for g in groups)):
                drawn = np.random.default_rng([*self.seeds(), rounds]).choice(len(self.source.problems), len(groups))
                numbers = np.repeat(drawn, size).tolist()
                found = self.verify(self.sample([self.source.problems[n].prompt for n in numbers]), numbers)
                everything = everything + found
                groups = fill(groups, groups_of(found, size))
                rounds += 1
        self.samples = [sample for group in groups for sample in group]
        further: dict[str, float] = {}
        if self.method.recipe == "dapo":
            further = {"rounds": rounds, "filtered_groups": sum(not is_mixed(g) for g in groups) / len(groups)}
        self.take_note(everything, **further)
        return self.samples

    def left_out(self) -> list[bool]:
        """Returns True for the samples of groups with equal outcomes, if the recipe filters them."""
        groups = groups_of(self.samples, self.method.samples_per_prompt)
        return [self.method.recipe == "dapo" and not is_mixed(group) for group in groups for _ in group]

    def _over_processes(self, value: int) -> int:
        count = torch.tensor(value, device=self.accelerator.device)
        return int(self.accelerator.reduce(count, reduction="sum"))


class OpdTrainer(_Verified, OpenDistillationTrainer):
    """TRL's `DistillationTrainer` with verified samples, for the metrics only.

    Args:
        source: Problems, method and teacher.
        **options: Options of `DistillationTrainer`, except the teacher.
    """

    def __init__(self, source: OnPolicySource, **options: Any) -> None:
        assert source.teacher is not None
        self.source = source
        super().__init__(teacher_model=source.teacher.model, **options)
        self.open_sampling(end_ids(causal_model(self.model), self.processing_class), self.args.seed)

    def sampled(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Verifies the samples and reports their metrics."""
        samples = self.verify(samples, [row["number"] for row in self.inputs])
        self.take_note(samples)
        return samples


def groups_of(samples: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    """Splits samples into groups of `size`, each of one prompt."""
    return [list(samples[start : start + size]) for start in range(0, len(samples), size)]


def is_mixed(group: Sequence[dict[str, Any]]) -> bool:
    """Returns True if a group has both correct and incorrect samples."""
    return len({sample["correct"] for sample in group}) == 2


def fill(groups: list[list[dict[str, Any]]], others: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Replaces groups with equal outcomes by the mixed ones among `others`, in their order, as far as there are any."""
    mixed = (group for group in others if is_mixed(group))
    return [group if is_mixed(group) else next(mixed, group) for group in groups]
