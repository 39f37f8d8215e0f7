"""A source that samples rollouts online from the policy of each step, with the same trainer."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.losses.kto import Kto
from losslens.losses.sft import Sft
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel
from losslens.models.tokens import encode_prompt
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.problems.verification import verdicts
from losslens.sampling.local import generate_samples
from losslens.training.batches import Examples
from losslens.training.run import train_run
from losslens.training.source import RolloutSource
from tests.conftest import frozen_source
from tests.test_trainers import logged, trainer_of

GROUPS, SAMPLES, BATCH, STEPS = 2, 4, 8, 3


class Online(RolloutSource):
    """Groups of samples of the policy, as many as it takes to fill a batch; `sampled` notes the texts of each step."""

    def __init__(self, loss: Loss, source: ReasoningGym, tokenizer: Any) -> None:
        self.loss, self.verifier, self.tokenizer = loss, source.verifier, tokenizer
        self.problems = source.problems("train", 20, seed=3)
        self.epoch_length = len(self.problems) * SAMPLES
        self.sampled: dict[int, list[str]] = {}

    def batch(self, step: int, policy: Any) -> Examples:
        order = np.random.default_rng(step).permutation(len(self.problems)).tolist()
        groups: list[pd.DataFrame] = []
        while len(order) >= GROUPS:
            groups.append(self.sample(1000 * step + len(order), [order.pop() for _ in range(GROUPS)], policy))
            with contextlib.suppress(InputError):  # no pair yet
                examples = Examples(pd.concat(groups, ignore_index=True), self.loss)
                if len(examples) >= BATCH:
                    self.sampled[step] = examples.table["completion"].tolist()
                    return examples.take(np.arange(BATCH))
        raise AssertionError("too few groups are mixed")

    def sample(self, seed: int, numbers: list[int], policy: Any) -> pd.DataFrame:
        problems = [self.problems[number] for number in numbers]
        found = generate_samples(
            policy, self.tokenizer, [problem.prompt for problem in problems], samples=SAMPLES, temperature=1.0,
            top_p=1.0, max_new_tokens=50, batch_size=GROUPS * SAMPLES, seed=seed,
        )  # fmt: skip
        repeated = [problem for problem in problems for _ in range(SAMPLES)]
        completions = [completion for group in found for completion in group]
        texts = [completion.text for completion in completions]
        return pd.DataFrame(
            {
                "problem_id": [problem.id for problem in repeated],
                "group": np.repeat(numbers, SAMPLES),
                "prompt_ids": [encode_prompt(self.tokenizer, problem.prompt) for problem in repeated],
                "completion_ids": [list(completion.ids) for completion in completions],
                "completion": texts,
                "reward": [float(each.correct) for each in verdicts(self.verifier, repeated, texts, seconds=10)],
            }
        )


@pytest.mark.parametrize(
    "loss",
    [Sft(name="sft"), Grpo(name="grpo", kl_coef=0.1), Kto(name="kto"), Dpo(name="dpo", pairs="all")],
    ids=lambda loss: loss.name,
)
def test_a_run_on_samples_of_its_policy(
    loss: Loss, make_plan: Any, base: LoadedModel, source: ReasoningGym, tmp_path: Path
) -> None:
    """It goes on from a checkpoint to the same bytes, with dropout and a source that knows nothing of what was before.

    The base is scored within the step: at the first one it is the policy, so that the log-ratios are 0, and later not.
    """
    plan = make_plan(
        loss, 1e-2, max_steps=STEPS, batch_size=BATCH, micro_batch=4, warmup_ratio=0, save_steps=1, log_steps=1
    )
    plan = dataclasses.replace(plan, lora=dataclasses.replace(plan.lora, dropout=0.1))

    def cut(step: int, values: dict[str, float]) -> None:
        if step == 2:
            raise KeyboardInterrupt

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    whole, resumed = (Online(loss, source, base.tokenizer) for _ in range(2))
    facts = train_run(plan, base, whole, tmp_path / "whole", lambda step, values: None)
    assert facts["epochs"] == STEPS * BATCH / whole.epoch_length
    with pytest.raises(KeyboardInterrupt):
        train_run(plan, base, Online(loss, source, base.tokenizer), tmp_path / "cut", cut)
    facts = train_run(plan, base, resumed, tmp_path / "cut", lambda step, values: None)
    assert facts["resumed_from"] == 1
    assert adapter_fingerprint(tmp_path / "cut" / "adapter") == adapter_fingerprint(tmp_path / "whole" / "adapter")
    assert adapter_fingerprint(tmp_path / "whole" / "adapter") != adapter_fingerprint(plan.initial_adapter)
    lines = logged(tmp_path / "whole")
    assert logged(tmp_path / "cut") == lines
    assert [line["train/epoch"] for line in lines] == [step * BATCH / whole.epoch_length for step in (1, 2, 3)]
    # What the policy of the last step wrote, and not what the base writes from the same seeds.
    assert resumed.sampled == {step: texts for step, texts in whole.sampled.items() if step > 0}
    base_writes = Online(loss, source, base.tokenizer)
    base_writes.batch(2, base.model)
    assert base_writes.sampled[2] != whole.sampled[2]
    if "reference" in loss.needs:
        names = [name for name in lines[0] if name.startswith("train/log_ratio/")]
        assert names
        assert all(lines[0][name] == pytest.approx(0, abs=1e-5) for name in names)
        assert all(abs(lines[2][name]) > 1e-3 for name in names if name in lines[2])
    assert ("train/kl" in lines[0]) == (loss.name == "kto")


def test_refuses_a_batch_of_the_wrong_size(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plan = make_plan(Sft(name="sft"), batch_size=8)
    with trainer_of(plan, base, tokenised, tmp_path) as trainer:
        trainer.source = frozen_source(make_plan(Sft(name="sft"), batch_size=7), tokenised)
        with pytest.raises(ValueError, match=r"source\.batch returned 7 examples; optim\.batch_size=8 are required"):
            trainer.train()
