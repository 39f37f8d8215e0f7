"""Other architectures than the embedded one, with random weights: training, saving, geometry, connectivity, CKA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedModel,
)

from benchmarks.full_size import qwen3_4b, saved
from losslens.models.adapters import attention_modules
from losslens.rollouts.frozen import freeze
from tests.conftest import command, script

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 512}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=512, n_positions=256))


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, intermediate_size=64, max_position_embeddings=256))


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (gpt2, ["attn.c_attn", "attn.c_proj"]),
        (gpt_neox, ["attention.dense", "attention.query_key_value"]),
        (gemma2, ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]),
    ],
)
def test_the_projections_of_the_attention_blocks(make: Any, names: list[str]) -> None:
    """The MLP's `c_proj` of GPT-2 and `dense_…` of GPT-NeoX are not among them."""
    assert attention_modules(make()) == names


def compared(output_dir: Path, model: Path, rollouts: pd.DataFrame, *overrides: str) -> pd.DataFrame:
    """Trains SFT and DPO from given rollouts, compares them on others, and gives the row of the pair."""
    known = rollouts["problem_id"].drop_duplicates()
    train, held_out = (rollouts[rollouts["problem_id"].isin(ids)] for ids in (known[:32], known[32:]))
    frozen = freeze(train, output_dir / "given", "train", {})
    others = freeze(held_out, output_dir / "given", "other", {})
    line = command(
        output_dir, "-m", "method=sft,dpo", f"model.path={model}", f"rollouts.path={frozen}", "data.eval_size=4"
    )
    line += ["model.name=random", "evaluation.max_tokens=8", "optim.max_steps=2", "lr=matched", "logger=none"]
    script(*line, *overrides)
    script(
        "analyze.py", "sweep=main", f"output_dir={output_dir}", f"probe_set.completions={others}",
        "connectivity.points=3", "connectivity.midpoint_problems=2", "num_directions=4",
    )  # fmt: skip
    analysis = output_dir / "main" / "analysis"
    assert json.loads((analysis / "manifest.json").read_text())["left_out"] == {}
    [pair] = pd.read_csv(analysis / "pairs.csv").to_dict("records")
    layers = pd.read_csv(analysis / "layers.csv")
    assert sorted(layers["layer"].unique()) == [0, 1]
    assert layers["cosine"].notna().all()
    runs = pd.read_csv(analysis / "runs.csv").dropna(subset=["norm"])
    assert (runs["norm"] > 0).all()
    assert (runs["relative_norm"] > 0).all()
    return pair


@pytest.mark.parametrize(("make", "targets"), [(gpt2, "attention"), (gpt_neox, "attention"), (gemma2, "all_linear")])
def test_any_architecture_goes_through(make: Any, targets: str, rollouts: pd.DataFrame, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = saved(make(), tmp_path / "model")
    pair = compared(tmp_path / "out", model, rollouts, f"model.target_modules={targets}")
    assert -1 < pair["cosine"] < 1
    assert 0 < pair["cka_last"] <= 1 + 1e-9
    assert pair["barrier_chord"] == pair["barrier_chord"]


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 512, "intermediate_size": 64},
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
    ],
    ids=["widths", "vocabulary"],
)
def test_a_model_of_the_papers_shapes_goes_through(
    changes: dict[str, int], rollouts: pd.DataFrame, tmp_path: Path
) -> None:
    """Two layers with the widths of Qwen3-4B's adapted projections, and two with its vocabulary.

    Both at once, in 36 layers, is for a GPU (benchmarks/full_size.py).
    """
    model = saved(qwen3_4b(layers=2, **changes), tmp_path / "model")
    sizes = ["optim.batch_size=4", "optim.micro_batch=2", "lora_rank=r32"]
    pair = compared(tmp_path / "out", model, rollouts.iloc[: 36 * 4], *sizes)
    assert -1 < pair["cosine"] < 1
    assert 0 < pair["cka_last"] <= 1 + 1e-9
    modules = pd.read_parquet(tmp_path / "out" / "main" / "analysis" / "run_modules.parquet")
    assert modules["module"].nunique() == 8
