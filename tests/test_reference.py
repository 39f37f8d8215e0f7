"""Reference log-probabilities of the base: computed once, cached, shared, and checked before the first step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from losslens.core.errors import InputError
from losslens.losses import Loss
from losslens.losses.dpo import Dpo
from losslens.losses.grpo import Grpo
from losslens.models.adapters import adapter_fingerprint
from losslens.models.loading import LoadedModel
from losslens.training.reference import ReferenceCache
from losslens.training.trainer import LossTrainer
from tests.conftest import train_frozen
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


def ran(
    loss: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, folder: Path, cache: Path, steps: int = 8
) -> str:
    folder.mkdir()
    plan = make_plan(loss, max_steps=steps, batch_size=8)
    train_frozen(plan, base, tokenised, folder, reference=ReferenceCache(cache, ABOUT))
    return adapter_fingerprint(folder / "adapter")


def test_each_rollout_is_scored_once_for_all_runs(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, scored: Counter
) -> None:
    """By the first run that needs a reference, whatever it needs it for: what another gets does not depend on it."""
    few = tokenised.iloc[:60]
    first = ran(DPO, make_plan, base, few, tmp_path / "dpo", tmp_path / "cache")
    once = Counter((*p, *c) for p, c in zip(few["prompt_ids"], few["completion_ids"], strict=True))
    assert scored == once
    ran(KL, make_plan, base, few, tmp_path / "kl", tmp_path / "cache")
    again = ran(DPO, make_plan, base, few, tmp_path / "again", tmp_path / "cache")
    assert scored == once
    assert again == first
    assert len(list((tmp_path / "cache").glob("*/logps.safetensors"))) == 1
    assert ran(DPO, make_plan, base, few, tmp_path / "afresh", tmp_path / "other") == first


@pytest.mark.parametrize(("loss", "met"), [(DPO, 2 * 2 * 8), (KL, 2 * 8)], ids=["pairs", "rollouts"])
def test_a_short_run_scores_only_the_rollouts_that_it_meets(
    loss: Loss, met: int, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, scored: Counter
) -> None:
    """Two steps of 8 pairs meet 32 rollouts, of 8 rollouts 16; a run that meets others changes nothing for them."""
    first = ran(loss, make_plan, base, tokenised, tmp_path / "first", tmp_path / "cache", steps=2)
    assert scored.total() == met < len(tokenised)
    ran(loss, make_plan, base, tokenised, tmp_path / "longer", tmp_path / "cache", steps=3)
    assert scored.total() == met + met * 3 / 2
    assert ran(loss, make_plan, base, tokenised, tmp_path / "again", tmp_path / "cache", steps=2) == first
    assert scored.total() == met + met * 3 / 2


@pytest.mark.parametrize("loss", [DPO, KL], ids=["pairs", "rollouts"])
def test_a_short_run_is_that_of_scores_of_all_rollouts_but_for_rounding(
    loss: Loss,
    make_plan: Any,
    base: LoadedModel,
    tokenised: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(loss, max_steps=2, batch_size=8)
    met = trained(plan, base, tokenised, tmp_path / "met", reference=ReferenceCache(tmp_path / "cache", ABOUT))
    logps = ReferenceCache.logps

    def of_all(self: ReferenceCache, few: pd.DataFrame, *arguments: Any) -> Any:
        found, file = logps(self, tokenised, *arguments)
        return [found[place] for place in few["place"]], file

    monkeypatch.setattr(ReferenceCache, "logps", of_all)
    whole = trained(plan, base, tokenised, tmp_path / "whole", reference=ReferenceCache(tmp_path / "cache", ABOUT))
    assert len(list((tmp_path / "cache").glob("*/logps.safetensors"))) == 2
    assert largest_difference(met, whole) < 1e-6


def test_losses_on_a_subset_get_their_reference(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """Each rollout's numbers, whichever rows are selected, in whatever order, under whatever labels."""

    class Turned(Grpo):
        def select(self, rollouts: pd.DataFrame) -> pd.DataFrame:
            return rollouts[rollouts["reward"] > 0].iloc[::-1].reset_index(drop=True)

    plan = make_plan(Turned(name="grpo", kl_coef=0.1), batch_size=8, max_steps=2)
    within = trained(plan, base, tokenised, tmp_path / "within")
    kept = trained(plan, base, tokenised, tmp_path / "kept", reference=ReferenceCache(tmp_path / "cache", ABOUT))
    assert largest_difference(kept, within) < 1e-6


@pytest.mark.parametrize("loss", [DPO, KL], ids=lambda loss: loss.name)
def test_cache_equals_scoring_within_a_step(
    loss: Loss, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    plan = make_plan(loss, batch_size=8)
    within = trained(plan, base, tokenised, tmp_path / "within")
    kept = trained(plan, base, tokenised, tmp_path / "kept", reference=ReferenceCache(tmp_path / "cache", ABOUT))
    assert largest_difference(kept, within) < 1e-5


def score_of(seen: list[int], stop_at: int = 10**9) -> Any:
    """Scores a token with −(its number), after so many rollouts fails."""

    def score(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend(inputs["input_ids"][:, 0].tolist())
        if len(seen) > stop_at:
            raise KeyboardInterrupt
        return -inputs["input_ids"][:, 1:].float() * (inputs["labels"][:, 1:] != -100)

    return score


ROWS = pd.DataFrame({"prompt_ids": [[1, 2], [3], [], []], "completion_ids": [[10, 20], [30], [40, 50, 60], []]})
EXPECTED = [[-10, -20], [-30], [-50, -60], []]


class TestCache:
    @pytest.fixture(autouse=True)
    def one_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("losslens.training.reference._BATCH_TOKENS", 1)

    def logps(self, folder: Path, score: Any, **about: str) -> list[list[float]]:
        found, file = ReferenceCache(folder, {**ABOUT, **about}).logps(ROWS, score, pad_token_id=0)
        assert file.exists()
        return [values.tolist() for values in found]

    def test_by_hand(self, tmp_path: Path) -> None:
        """Of an empty prompt the first token has nothing before it, and no probability."""
        seen: list[int] = []
        assert self.logps(tmp_path, score_of(seen)) == EXPECTED
        assert sorted(seen) == [1, 3, 40]
        assert self.logps(tmp_path, score_of(seen)) == EXPECTED
        assert len(seen) == 3

    def test_base_precision_and_device_are_part_of_the_key(self, tmp_path: Path) -> None:
        seen: list[int] = []
        for about in ({}, {"base": "other"}, {"dtype": "bfloat16"}, {"device": "cuda"}):
            self.logps(tmp_path, score_of(seen), **about)
        assert len(seen) == 3 * 3 + 4  # on CUDA all at once, the one without tokens too

    def test_interrupted_scoring_resumes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("losslens.training.reference._SAVE_TOKENS", 1)
        seen: list[int] = []
        with pytest.raises(KeyboardInterrupt):
            self.logps(tmp_path, score_of(seen, stop_at=2))
        assert len(seen) == 3
        assert self.logps(tmp_path, score_of(seen)) == EXPECTED
        assert len(seen) == 4

    @pytest.mark.parametrize(
        "damage", [lambda b: b[:-1], lambda b: b[:-4] + b"\0\0\0\x40", lambda b: b"", lambda b: b"{}"]
    )
    def test_a_damaged_file_is_recomputed(self, damage: Any, tmp_path: Path) -> None:
        seen: list[int] = []
        assert self.logps(tmp_path, score_of(seen)) == EXPECTED
        [file] = tmp_path.glob("*/logps.safetensors")
        file.write_bytes(damage(file.read_bytes()))
        assert self.logps(tmp_path, score_of(seen)) == EXPECTED
        assert len(seen) == 6


def test_a_reference_that_is_not_the_base_is_refused_before_the_first_step(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LossTrainer.base_logps
    monkeypatch.setattr(LossTrainer, "base_logps", lambda self, inputs: 1.01 * original(self, inputs))
    with pytest.raises(InputError, match=r"logps.safetensors: .* by 0\.0\d+ nats .*precision.*template.*BOS"):
        ran(DPO, make_plan, base, tokenised, tmp_path / "dpo", tmp_path / "cache")


def test_dropout_of_the_base_is_off_while_it_is_scored(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in base.model.modules():
        if hasattr(module, "attention_dropout"):
            monkeypatch.setattr(module, "attention_dropout", 0.1)
    seen: list[torch.Tensor] = []
    original = LossTrainer.base_logps

    def twice(self: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.extend([original(self, inputs), original(self, inputs)])
        return seen[-1]

    monkeypatch.setattr(LossTrainer, "base_logps", twice)
    ran(DPO, make_plan, base, tokenised.iloc[:40], tmp_path / "dpo", tmp_path / "cache")
    assert torch.equal(seen[0], seen[1])
