"""The base's log-probabilities of the rollouts: scored once, kept, shared, and checked at the first step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from losslens.adapters import adapter_sha256
from losslens.errors import InputError
from losslens.losses import Loss
from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.models import LoadedModel
from losslens.training.reference import ReferenceCache
from losslens.training.run import train_run
from losslens.training.trainer import LossTrainer
from tests.test_trainers import largest_difference, trained

DPO, KL = Dpo(name="dpo"), Grpo(name="grpo", kl_coef=0.1)
ABOUT = {"base": "test", "dtype": "float32"}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, ...]]:
    """How often the base has scored each sequence."""
    seen: Counter[tuple[int, ...]] = Counter()
    original = LossTrainer.base_logps

    def counted(self: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen[tuple(ids[mask == 1].tolist())] += 1
        return original(self, inputs)

    monkeypatch.setattr(LossTrainer, "base_logps", counted)
    return seen


def ran(loss: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, folder: Path, cache: Path) -> str:
    folder.mkdir()
    plan = dataclasses.replace(make_plan(loss, max_steps=6, batch_size=8), reference=ReferenceCache(cache, ABOUT))
    train_run(plan, base, tokenised, folder, lambda step, values: None)
    return adapter_sha256(folder / "adapter")


def sequences_of(rollouts: pd.DataFrame) -> set[tuple[int, ...]]:
    return {(*p, *c) for p, c in zip(rollouts["prompt_ids"], rollouts["completion_ids"], strict=True)}


def test_each_rollout_is_scored_once_for_all_runs(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, scored: Counter
) -> None:
    """DPO needs its pairs only; GRPO with a KL term the rest; a second run of either nothing more."""
    few = tokenised.iloc[:60]
    first = ran(DPO, make_plan, base, few, tmp_path / "dpo", tmp_path / "cache")
    pairs = few.iloc[np.unique(DPO.select_pairs(few))]
    assert set(scored) == sequences_of(pairs)
    assert len(pairs) < 40
    ran(KL, make_plan, base, few, tmp_path / "kl", tmp_path / "cache")
    again = ran(DPO, make_plan, base, few, tmp_path / "again", tmp_path / "cache")
    duplicates = Counter((*p, *c) for p, c in zip(few["prompt_ids"], few["completion_ids"], strict=True))
    assert scored == duplicates
    assert again == first
    assert len(list((tmp_path / "cache").glob("*/logps.safetensors"))) == 1


@pytest.mark.parametrize("loss", [DPO, KL], ids=lambda loss: loss.name)
def test_it_is_what_the_base_says_within_a_batch(
    loss: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plan = make_plan(loss, batch_size=8)
    kept = dataclasses.replace(plan, reference=ReferenceCache(tmp_path / "cache", ABOUT))
    within = trained(plan, base, tokenised, tmp_path / "within")
    assert largest_difference(trained(kept, base, tokenised, tmp_path / "kept"), within) < 1e-5


def score_of(seen: list[int], stop_at: int = 10**9) -> Any:
    """Scores a token with −(its number), after so many rollouts fails."""

    def score(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(inputs["input_ids"][:, 0].tolist())
        if len(seen) > stop_at:
            raise KeyboardInterrupt
        return -inputs["input_ids"][:, 1:].float() * (inputs["labels"][:, 1:] != -100)

    return score


ROWS = pd.DataFrame({"prompt_ids": [[1, 2], [3], []], "completion_ids": [[10, 20], [30], [40, 50, 60]]})


class TestCache:
    def logps(self, folder: Path, score: Any, rows: list[int], **about: str) -> list[list[float]]:
        found = ReferenceCache(folder, {**ABOUT, **about}).logps(ROWS, np.array(rows), score, pad_token_id=0, at_once=1)
        return [found[row].tolist() for row in rows]

    def test_by_hand(self, tmp_path: Path) -> None:
        """Of an empty prompt the first token has nothing before it, and no probability."""
        seen: list[int] = []
        assert self.logps(tmp_path, score_of(seen), [0, 1, 2]) == [[-10, -20], [-30], [-50, -60]]
        assert sorted(seen) == [1, 3, 40]
        assert self.logps(tmp_path, score_of(seen), [2, 2, 0]) == [[-50, -60], [-50, -60], [-10, -20]]
        assert len(seen) == 3

    def test_another_base_or_precision_is_another(self, tmp_path: Path) -> None:
        seen: list[int] = []
        for about in ({}, {"base": "other"}, {"dtype": "bfloat16"}):
            self.logps(tmp_path, score_of(seen), [0], **about)
        assert len(seen) == 3

    def test_who_is_killed_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("losslens.training.reference._A_SAVE", 1)
        seen: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            self.logps(tmp_path, score_of(seen, stop_at=2), [0, 1, 2])
        assert len(seen) == 3
        self.logps(tmp_path, score_of(seen), [0, 1, 2])
        assert len(seen) == 4

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-1], lambda b: b[:-4] + b"\0\0\0\x40", lambda b: b"", lambda b: b"{}"]
    )
    def test_a_damaged_file_is_made_again(self, damage: Any, tmp_path: Path) -> None:
        seen: list[int] = []
        expected = self.logps(tmp_path, score_of(seen), [0, 1, 2])
        [file] = tmp_path.glob("*/logps.safetensors")
        file.write_bytes(damage(file.read_bytes()))
        assert self.logps(tmp_path, score_of(seen), [0, 1, 2]) == expected
        assert len(seen) == 6


def test_a_reference_that_is_not_the_base_is_refused_before_the_first_step(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LossTrainer.base_logps
    monkeypatch.setattr(LossTrainer, "base_logps", lambda self, inputs: 1.01 * original(self, inputs))
    with pytest.raises(InputError, match=r"scores a token 0\.0\d+ nats from .*template.*BOS.*precision"):
        ran(DPO, make_plan, base, tokenised, tmp_path / "dpo", tmp_path / "cache")
