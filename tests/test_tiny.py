"""The shipped student and teacher are what their card says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from losslens.evaluation.outcomes import evaluate
from losslens.models.tokens import encode_completion, encode_prompt
from losslens.problems.reasoning_gym import ReasoningGym
from tests.conftest import TINY

ROLES = pytest.mark.parametrize(("role", "lowest", "highest"), [("student", 0.5, 0.7), ("teacher", 0.85, 1.0)])


@ROLES
def test_solves_what_it_should(role: str, lowest: float, highest: float, source: ReasoningGym) -> None:
    """On the default sweep's 500 held-out problems, step by step before the answer."""
    model = AutoModelForCausalLM.from_pretrained(TINY / role, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / role)
    problems = source.problems("eval", 500, seed=0)
    outcomes = evaluate(
        model, tokenizer, source.verifier, problems, max_tokens=96, batch_size=128, seconds=10, description=role
    )
    assert lowest <= outcomes["correct"].mean() <= highest
    steps = outcomes["completion"].str.count(r"= -?\d+\n")
    terms = [problem.metadata["metadata"]["num_terms"] for problem in problems]
    assert (steps == [n - 1 for n in terms]).mean() > 0.95


@ROLES
def test_is_a_small_qwen3(role: str, lowest: float, highest: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY / role)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert any("q_norm" in name for name, _ in model.named_parameters())


def test_sizes() -> None:
    files = [file for role in ("student", "teacher") for file in (TINY / role).iterdir()]
    assert {file.suffix for file in files} == {".json", ".jinja", ".safetensors"}
    assert sum(file.stat().st_size for file in files) < 8_000_000
    parameters = [AutoModelForCausalLM.from_pretrained(TINY / role).num_parameters() for role in ("student", "teacher")]
    assert 0.8e6 < parameters[0] < 1.2e6
    assert parameters[1] > 1.5 * parameters[0]


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_tokenizer_keeps_any_text(role: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY / role)
    for text in ("-12 + 7 = -5\n<answer>-5</answer>", "Zażółć gęślą jaźń 漢字 🎲\t\n", "  two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4
    prompt = encode_prompt(tokenizer, "1 + 2 =")
    assert tokenizer.decode(prompt) == "<|im_start|>user\n1 + 2 =<|im_end|>\n<|im_start|>assistant\n"
    assert encode_completion(tokenizer, "3", finished=True)[-1] == tokenizer.eos_token_id
    assert encode_completion(tokenizer, "3", finished=False)[-1] != tokenizer.eos_token_id
