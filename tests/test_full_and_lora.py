"""Runs of full fine-tuning and of LoRA in one analysis."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from losslens.analysis.cohort import ComparedAdapter, Point, common_modules
from losslens.analysis.forward_passes import ForwardPasses
from losslens.analysis.pipeline import Analysis, analyse
from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.errors import InputError
from losslens.models import full_model
from losslens.models.adapters import save_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.pipeline.train_job import train_job
from losslens.rollouts.frozen import freeze
from losslens.runs.run import Run
from tests.conftest import ROOT
from tests.test_analysis import edited, settings
from tests.test_full_finetuning import changed_base

FEW = (
    "data.eval_size=0", "logger=none", "optim.max_steps=2", "optim.batch_size=4", "optim.log_steps=1",
    "optim.save_steps=2", "optim.snapshot_steps=1", "optim.scheduler=constant", "optim.warmup_ratio=0",
)  # fmt: skip


def train(output_dir: Path, frozen: Path, *overrides: str) -> Run:
    arguments = [*FEW, f"rollouts.path={frozen}", f"output_dir={output_dir}", *overrides]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        outcome = train_job(parse(TrainConfig, compose("train", arguments)))
    assert outcome.state == "completed", outcome.error
    return Run(output_dir / "main" / outcome.run)


@pytest.fixture(scope="module")
def outputs(rollouts: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT of two data orders on all weights, and LoRA twice, on all linear modules."""
    folder = tmp_path_factory.mktemp("outputs")
    frozen = freeze(rollouts, folder / "frozen", "test", {"policy": "test"})
    for adapter in ("none", "lora"):
        for seed in (1, 2):
            train(folder, frozen, f"adapter={adapter}", f"seed={seed}", "model.target_modules=all_linear")
    return folder


@pytest.fixture(scope="module")
def analysis(outputs: Path) -> Analysis:
    return analyse(settings(outputs, "pairs=none"))


def test_both_are_in_the_tables(analysis: Analysis) -> None:
    runs = analysis.tables.runs.set_index("label")
    assert sorted(runs.index.drop("base", errors="ignore")) == [
        "sft adapter none s1", "sft adapter none s2", "sft s1", "sft s2",
    ]  # fmt: skip
    full, lora = runs.loc["sft adapter none s1"], runs.loc["sft s1"]
    assert pd.isna(full["rank"])
    assert pd.isna(full["init_seed"])
    assert pd.isna(full["drift_min"])
    assert lora["rank"] == 8
    assert lora["drift_min"] >= 0
    assert full["effective_rank"] > lora["effective_rank"]
    assert sorted(analysis.tables.pairs["pairing"]) == sorted(
        ["same init", "same init", "same order", "same order", "other", "other"]
    )


def test_the_norm_is_that_of_the_common_modules(analysis: Analysis, outputs: Path, base: LoadedModel) -> None:
    assert len(analysis.cohort.modules) == 35
    [name] = [name for name in analysis.cohort.names if "full" in name and "-s1-" in name]
    weights, start = load_file(outputs / "main" / name / "model" / "model.safetensors"), base.model.state_dict()
    squares = [
        float((weights[f"{module}.weight"].double() - start[f"{module}.weight"].double()).square().sum())
        for module in analysis.cohort.modules
    ]
    runs = analysis.tables.runs.set_index("run")
    assert runs.loc[name, "norm"] == pytest.approx(np.sqrt(sum(squares)), rel=1e-6)


def test_full_runs_alone_are_compared_on_all_their_linear_modules(outputs: Path) -> None:
    members = [
        ComparedAdapter(f"full{number}", run / "model", str(number), base=Path(run))
        for number, run in enumerate(outputs.glob("main/*full*"))
    ]
    [first, _] = members
    whole = ComparedAdapter("w", first.adapter, "w", base=first.adapter)
    [*_, last] = common_modules([whole])
    assert last.endswith("self_attn.v_proj")
    with whole.point.open() as update:
        assert not update[last].dense().any()  # compared with itself
    with pytest.raises(InputError, match="give model_path=FOLDER"), Point(first.adapter, "x").open():
        pass


def test_at_a_norm_a_model_lies_on_the_path_between_two_snapshots(outputs: Path, base: LoadedModel) -> None:
    found = analyse(settings(outputs, "pairs=none", checkpoint="norm"))
    norms = found.tables.runs["norm"].dropna().to_numpy()
    assert norms == pytest.approx(norms.min(), rel=1e-5)
    [point, *_] = sorted(outputs.glob("main/*full*/snapshots/norm-*"))
    manifest = Run(point).manifest
    made = load_file(point / "model" / "model.safetensors")
    steps = {0: {name: value.float() for name, value in base.model.state_dict().items()}}
    for step in (1, 2):
        steps[step] = load_file(point.parent / f"step-{step:06d}" / "model" / "model.safetensors")
    before, after = (steps[step] for step in manifest["between_steps"])
    for name, weight in made.items():
        expected = (1 - manifest["weight"]) * before[name] + manifest["weight"] * after[name]
        assert torch.allclose(weight, expected, rtol=0, atol=1e-7), name


def test_a_base_that_is_gone_is_one_line(outputs: Path) -> None:
    [first, *_] = sorted(outputs.glob("main/*full*"))
    manifest = Run(first).manifest
    model = {**manifest["config"]["model"], "path": "/nowhere/base"}
    changed = edited(first / "manifest.json", config={**manifest["config"], "model": model})
    with changed, pytest.raises(InputError, match="give model_path=FOLDER"):
        analyse(settings(outputs, "pairs=none"))


def test_paths_between_an_adapter_and_a_model_move_all_weights(base: LoadedModel, tmp_path: Path) -> None:
    """Logits at (0.25, 0.75) equal those of W0 + 0.25·s·B·A + 0.75·(W − W0), norms and embeddings included."""
    whole = changed_base(tmp_path / "model", base, 0.02)
    with preserved(base.model):
        torch.manual_seed(0)
        model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        save_adapter(model, tmp_path / "adapter")
    start = Path(base.model.name_or_path)
    members = {
        "lora": ComparedAdapter("lora", tmp_path / "adapter", "a"),
        "full": ComparedAdapter("full", whole, "b", base=start),
    }
    passes = ForwardPasses.__new__(ForwardPasses)
    modules = common_modules(list(members.values()))
    vars(passes).update(_members=members, _cohort=SimpleNamespace(modules=modules), _source=None)
    kind: Any = type("Passes", (ForwardPasses,), {"_base": base})
    passes.__class__ = kind
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        plain = base.model(ids).logits
        with passes.between(["lora", "full"]) as (model, set_weights):
            set_weights([0.25, 0.75])
            found = model(ids).logits
        with members["lora"].point.open() as update:
            deltas = {f"{module}.weight": 0.25 * update[module].dense() for module in modules}
        trained = load_file(whole / "model.safetensors")
        state = {}
        for name, weight in base.model.state_dict().items():
            end = trained.get(name, trained["model.embed_tokens.weight"])
            state[name] = weight.float() + 0.75 * (end - weight.float())
            if name in deltas:
                state[name] = state[name] + torch.from_numpy(deltas[name]).float()
        expected = torch.func.functional_call(base.model, state, (ids,), tie_weights=False).logits
        assert torch.allclose(found, expected, atol=1e-4)
        assert not torch.allclose(found, plain, atol=1e-2)
        assert torch.equal(base.model(ids).logits, plain)


def test_an_adapter_and_its_merged_model_are_one_update(base: LoadedModel, tmp_path: Path) -> None:
    with preserved(base.model):
        full_model.train_all_weights(base.model)
        full_model.save_model(base.model, tmp_path / "merged")
    with preserved(base.model):
        torch.manual_seed(0)
        model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "merged" / "model.safetensors"
    weights = load_file(file)
    with Point(tmp_path / "adapter", "a").open() as adapter:
        for module in adapter.modules:
            weights[f"{module}.weight"] += torch.from_numpy(adapter[module].dense()).float()
        save_file(weights, file, metadata={"format": "pt"})
        with Point(tmp_path / "merged", "b", Path(base.model.name_or_path)).open() as merged:
            for module in adapter.modules:
                ours, theirs = adapter[module].dense(), merged[module].dense()
                assert theirs == pytest.approx(ours, abs=1e-7)
            assert not merged["model.layers.0.self_attn.k_proj"].dense().any()
