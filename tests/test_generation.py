"""Greedy completions do not depend on the batch size; samples depend only on the seed and the batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from losslens.core.completions import Completion, Journal
from losslens.models.loading import LoadedModel
from losslens.problems.reasoning_gym import ReasoningGym
from losslens.sampling import local
from losslens.sampling.local import generate_greedy, generate_samples


@pytest.fixture(scope="module")
def prompts(source: ReasoningGym) -> list[str]:
    return [problem.prompt for problem in source.problems("eval", 40, seed=4)]


def greedy(base: LoadedModel, prompts: list[str], batch_size: int, max_new_tokens: int = 64) -> list:
    return generate_greedy(base.model, base.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)


def test_greedy_does_not_depend_on_the_batch_size(base: LoadedModel, prompts: list[str]) -> None:
    alone = greedy(base, prompts, 1)
    for batch_size in (3, 16, 40):
        assert greedy(base, prompts, batch_size) == alone
    assert greedy(base, prompts[::-1], 16) == alone[::-1]


def test_close_calls_are_decoded_without_a_batch(
    base: LoadedModel, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched results are falsified on purpose, so only completions decoded on their own can be correct."""
    alone = greedy(base, prompts, 1)
    honest = local._generate

    def disturbed(model, tokenizer, encoded, *rest):
        if len(encoded) > 1:
            encoded = [ids[:-8] + ids[-7:] for ids in encoded]
        return honest(model, tokenizer, encoded, *rest)

    monkeypatch.setattr(local, "_generate", disturbed)
    assert greedy(base, prompts, 16) != alone
    monkeypatch.setitem(local._CLOSE_CALL, torch.float32, float("inf"))
    assert greedy(base, prompts, 16) == alone


def test_batching_changes_logits_by_far_less_than_the_threshold(base: LoadedModel, prompts: list[str]) -> None:
    encoded = [local.encode_prompt(base.tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad = base.tokenizer.pad_token_id
    with torch.inference_mode():
        padded = base.model(
            input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded]),
            attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded]),
            position_ids=torch.tensor([[0] * (width - len(ids)) + list(range(len(ids))) for ids in encoded]),
        ).logits[:, -1]
        single = torch.cat([base.model(input_ids=torch.tensor([ids])).logits[:, -1] for ids in encoded])
    assert (padded - single).abs().max() < local._CLOSE_CALL[torch.float32] / 10


def test_truncated_completions_are_not_finished(base: LoadedModel, prompts: list[str]) -> None:
    cut, whole = greedy(base, prompts[:4], 4, max_new_tokens=5), greedy(base, prompts[:4], 4)
    assert [(c.finished, c.tokens) for c in cut] == [(False, 5)] * 4
    assert all(c.finished for c in whole)
    assert all(w.text.startswith(c.text) for c, w in zip(cut, whole, strict=True))


def test_samples_depend_on_the_seed(base: LoadedModel, prompts: list[str]) -> None:
    def sample(seed: int, temperature: float = 1.0) -> list:
        options = {"samples": 3, "temperature": temperature, "top_p": 1.0, "max_new_tokens": 48, "batch_size": 8}
        return generate_samples(base.model, base.tokenizer, prompts[:6], seed=seed, **options)

    state = torch.random.get_rng_state()
    first = sample(0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert sample(0) == first
    assert sample(1) != first
    assert [len(group) for group in first] == [3] * 6
    assert len({c.text for group in first for c in group}) > 6
    cold = sample(0, temperature=1e-4)
    assert [[c.text for c in group] for group in cold] == [[c.text] * 3 for c in greedy(base, prompts[:6], 6, 48)]


def test_generation_disables_dropout_and_restores_training_mode(
    base: LoadedModel, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_greedy(base.model, base.tokenizer, prompts[:4], max_new_tokens=24, batch_size=4)
    for module in base.model.modules():
        if hasattr(module, "attention_dropout"):
            monkeypatch.setattr(module, "attention_dropout", 0.5)
    base.model.train()
    try:
        found = generate_greedy(base.model, base.tokenizer, prompts[:4], max_new_tokens=24, batch_size=4)
        assert base.model.training
    finally:
        base.model.eval()
    assert found == expected


def test_greedy_resumes_with_another_batch_size(base: LoadedModel, prompts: list[str], tmp_path: Path) -> None:
    whole = greedy(base, prompts, 16)
    journal = Journal(tmp_path / "j.jsonl")
    journal.add({str(i): whole[i] for i in range(16)})
    options = {"max_new_tokens": 64, "batch_size": 10, "journal": journal}
    assert generate_greedy(base.model, base.tokenizer, prompts, **options) == whole
    journal.close()
    assert len((tmp_path / "j.jsonl").read_text().splitlines()) == len(prompts)


def test_a_journal_of_another_device_type_is_not_resumed(base: LoadedModel, prompts: list[str], tmp_path: Path) -> None:
    options = {"samples": 2, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 32, "batch_size": 8, "seed": 1}
    whole = generate_samples(base.model, base.tokenizer, prompts[:8], **options)
    journal = Journal(tmp_path / "j.jsonl")
    journal.add({str(i): Completion("from elsewhere", 2, True) for i in range(8)}, "cuda:AAAA")
    assert generate_samples(base.model, base.tokenizer, prompts[:8], **options, journal=journal) == whole
    journal.close()
    assert "from elsewhere" not in (tmp_path / "j.jsonl").read_text()
