"""Full fine-tuning (`adapter=none`): all weights train from the base, which stays as it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, MambaConfig, MambaForCausalLM

from losslens.config.parse import parse
from losslens.config.training import TrainConfig
from losslens.core.errors import InputError
from losslens.losses.kto import Kto
from losslens.losses.sft import Sft
from losslens.models import full_model
from losslens.models.loading import LoadedModel, preserved
from losslens.models.trained_weights import as_base, changes_weights, weights_fingerprint, with_weights
from losslens.runs.labels import labels
from losslens.runs.spec import RunSpec
from losslens.training.callbacks import ChecksumCheckpoint, checkpoint_fault
from losslens.training.run import make_trainer
from losslens.updates.checkpoint import open_update
from tests.conftest import ROOT, frozen_source, train_frozen

if TYPE_CHECKING:
    from losslens.training.run import TrainingPlan


@pytest.fixture(scope="session")
def full_plan(make_plan: Any) -> Any:
    def make(loss: Any, learning_rate: float = 1e-4, **optim: Any) -> TrainingPlan:
        plan = make_plan(loss, learning_rate, **{"batch_size": 8, **optim})
        return dataclasses.replace(plan, lora=None, initial_adapter=None)

    return make


@pytest.fixture(scope="module")
def run(full_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, logged and with a snapshot every two."""
    folder = tmp_path_factory.mktemp("full")
    plan = full_plan(Sft(name="sft"), max_steps=4, log_steps=2, save_steps=2, snapshot_steps=2)
    train_frozen(plan, base, tokenised, folder)
    return folder


def digest(model: Any) -> str:
    """Hash of all weights."""
    weights = model.state_dict()
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def changed_base(folder: Path, base: LoadedModel, change: float, seed: int = 0) -> Path:
    """A model folder: the base with noise of standard deviation `change` on every weight."""
    with preserved(base.model):
        full_model.train_all_weights(base.model)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in base.model.parameters():
                weight += change * torch.randn(weight.shape, generator=generator)
        full_model.save_model(base.model, folder)
    return folder


def test_one_step_equals_a_step_by_hand(
    full_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """AdamW's first step, with bias correction, is −lr·(g/(|g| + ε) + λ·w); λ = 0 for norms, g clipped to norm 0.5."""
    plan = full_plan(Sft(name="sft"), max_steps=1, scheduler="constant", warmup_ratio=0.0, max_grad_norm=0.5)
    train_frozen(plan, base, tokenised, tmp_path)

    model = AutoModelForCausalLM.from_pretrained(base.model.name_or_path, dtype=torch.float32)
    examples = frozen_source(plan, tokenised).batch(0, None).collate(base.tokenizer.pad_token_id)
    labels_ = examples["labels"]
    logits = model(input_ids=examples["input_ids"], attention_mask=examples["attention_mask"]).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_[:, 1:].flatten(), ignore_index=-100).backward()
    gradients = [weight.grad for weight in model.parameters()]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    scale = min(1.0, 0.5 / (norm.item() + 1e-6))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gradient = weight.grad * scale
            if "norm" not in name:
                weight *= 1 - plan.learning_rate * plan.optim.weight_decay
            weight -= plan.learning_rate * gradient / (gradient.abs() + 1e-8)

    trained = load_file(tmp_path / "model" / "model.safetensors")
    assert set(trained) == {name for name, _ in model.named_parameters()}
    moved = 0
    for name, weight in model.named_parameters():
        # Where the gradient is about ε, rounding decides.
        settled = (weight.grad * scale).abs() > 1e-6
        moved += int(settled.sum())
        assert torch.allclose(trained[name][settled], weight[settled], rtol=0, atol=2e-6), name
    assert moved > 0.5 * sum(weight.numel() for weight in model.parameters())


def test_the_base_is_unchanged_and_the_run_is_a_model_of_transformers(run: Path, base: LoadedModel) -> None:
    assert digest(base.model) == digest(
        AutoModelForCausalLM.from_pretrained(base.model.name_or_path, dtype=torch.float32)
    )
    assert not full_model.is_trained_whole(base.model)
    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    assert digest(loaded) != digest(base.model)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    folders = (run / "model", Path(base.model.name_or_path))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert {k for k in ours if ours[k] != theirs.get(k)} <= {"transformers_version", "dtype"}
    assert sorted(file.name for file in (run / "model").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert not (run / "adapter").exists()


def test_an_interrupted_run_resumes_byte_identically(
    run: Path, full_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt

    plan = full_plan(Sft(name="sft"), max_steps=4, log_steps=2, save_steps=2, snapshot_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train_frozen(plan, base, tokenised, tmp_path, stop)
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    assert checkpoint_fault(checkpoint, "") == ""
    assert train_frozen(plan, base, tokenised, tmp_path)["resumed_from"] == 2
    for file in ("model/model.safetensors", "model/config.json", "snapshots/step-000002/model/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (run / file).read_bytes()
    resumed, whole = (
        [json.loads(line)["geometry/norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path, run)
    )
    assert resumed == whole


def test_a_checkpoint_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("config.json", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
        (tmp_path / "checkpoint-2").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-2" / name).write_text("x")
    seal = ChecksumCheckpoint("mine")
    arguments, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=2)
    seal.on_save(arguments, state, None)  # type: ignore[arg-type]
    assert checkpoint_fault(tmp_path / "checkpoint-2", "mine") == "it was written without model.safetensors"
    (tmp_path / "checkpoint-2" / "model.safetensors").write_text("x")
    seal.on_save(arguments, state, None)  # type: ignore[arg-type]
    assert checkpoint_fault(tmp_path / "checkpoint-2", "mine") == ""


def test_the_norm_is_tracked(run: Path, base: LoadedModel) -> None:
    start = dict(base.model.named_parameters())
    trained = load_file(run / "model" / "model.safetensors")
    changes = {
        name: float((trained[name].double() - start[name].detach().double()).square().sum())
        for name in trained if trained[name].dim() > 1 and "embed" not in name
    }  # fmt: skip
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["geometry/norm"] == pytest.approx(sum(changes.values()) ** 0.5, rel=1e-6)
    of_layer = sum(value for name, value in changes.items() if ".layers.0." in name)
    assert last["geometry/norm/layer_0"] == pytest.approx(of_layer**0.5, rel=1e-6)
    of_projection = sum(value for name, value in changes.items() if name.endswith("q_proj.weight"))
    assert last["geometry/norm/q_proj"] == pytest.approx(of_projection**0.5, rel=1e-6)


def test_scoring_uses_the_trained_weights_and_restores_the_base(base: LoadedModel, tmp_path: Path) -> None:
    folder = changed_base(tmp_path / "model", base, 0.05)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base.model(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        with with_weights(base.model, folder) as model:
            found = model(ids).logits
        assert torch.equal(found, expected)
        assert not torch.allclose(found, before)
        assert torch.equal(base.model(ids).logits, before)


def test_the_reference_stays_the_base(
    full_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """KTO's mismatched pairs are scored by the base in every step, when the weights have long moved away from it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = full_plan(Kto(name="kto"), max_steps=2)
    with preserved(base.model):
        trainer = make_trainer(plan, base, frozen_source(plan, tokenised), tmp_path, [])
        inputs = trainer.get_batch_samples(iter(()), 1, trainer.args.device)[0][0]
        before = trainer.base_logps(inputs)
        assert not changes_weights(trainer.model)
        with torch.no_grad():
            for weight in trainer.model.parameters():
                weight += 0.01
        assert changes_weights(trainer.model)
        assert torch.equal(trainer.base_logps(inputs), before)
        assert not torch.allclose(trainer._logps(inputs), before)
        own = trainer.model.lm_head.weight
        with as_base(trainer.model):
            assert trainer.model.lm_head.weight is not own
            assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
        assert trainer.model.lm_head.weight is own


def test_the_weights_are_known_by_their_content(base: LoadedModel, tmp_path: Path) -> None:
    one, same, other = (
        weights_fingerprint(changed_base(tmp_path / name, base, 0.05, seed))
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    assert one == same != other
    (tmp_path / "one" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"contains no model\.safetensors"):
        weights_fingerprint(tmp_path / "one")


def test_another_architecture_is_refused(base: LoadedModel, tmp_path: Path) -> None:
    folder = changed_base(tmp_path / "model", base, 0.05)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="model"), with_weights(base.model, folder):
        pass


def test_a_quantised_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(quantization_config={"quant_method": "bitsandbytes"})
    config.get_text_config = lambda: config
    monkeypatch.setattr(full_model, "load_config", lambda source: config)
    with pytest.raises(InputError, match=r"model\.path=x: its weights are quantised \(bitsandbytes\)"):
        full_model.require_trainable(SimpleNamespace(field="model.path", path="x"))  # type: ignore[arg-type]


def spec(*overrides: str) -> RunSpec:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return RunSpec.of(parse(TrainConfig, compose("train", list(overrides))))


def test_what_only_an_adapter_has_is_not_part_of_a_full_run() -> None:
    full = spec("adapter=none")
    assert full.run.name.startswith("sft-conventional-full-tiny-s42-")
    for other in (["lora_rank=r32"], ["init_seed=1"], ["model.target_modules=all_linear"], ["lora_rank.dropout=0.1"]):
        assert spec("adapter=none", *other).identity == full.identity
    assert spec("adapter=none", "seed=1").identity != full.identity
    assert full.config.lora_rank is None
    assert full.config.init_seed is None
    assert full.identity["learning_rate"] == pytest.approx(spec().identity["learning_rate"] / 10, rel=1e-12)
    assert spec("adapter=none", "lr.peak=0.5").identity["learning_rate"] == 0.5
    assert spec("adapter=lora").identity == spec().identity


def test_an_adapter_needs_its_rank() -> None:
    with pytest.raises(InputError, match="adapter=lora: lora_rank and init_seed must be set"):
        spec("init_seed=null")
    with pytest.raises(InputError, match="adapter"):
        spec("adapter=dora2")


def test_online_grpo_with_a_reference_needs_an_adapter() -> None:
    with pytest.raises(InputError, match=r"method\.kl_coef=0\.1: .* no reference with adapter=none"):
        spec("adapter=none", "method=online_grpo", "method.kl_coef=0.1")


def test_labels_tell_full_fine_tuning_from_adapters() -> None:
    identities = {run: spec(*overrides).identity for run, overrides in {
        "a": ["adapter=none"], "b": ["lora_rank=r8"], "c": ["lora_rank=r16"],
    }.items()}  # fmt: skip
    found = labels(identities)
    assert found["a"] == "sft adapter none"
    assert "init" not in "".join(found.values())
    assert len(set(found.values())) == 3


@pytest.mark.parametrize(
    "model",
    [
        lambda: GptOssForCausalLM(
            GptOssConfig(
                num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, vocab_size=32,
            )
        ),
        lambda: MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=16, state_size=4, vocab_size=32)),
    ],
    ids=["experts with biases", "convolutions and states"],
)  # fmt: skip
def test_the_tracked_norm_is_that_of_the_analysis(model: Any, tmp_path: Path) -> None:
    """Of tensors with several dimensions not all are weights of modules that are compared."""
    torch.manual_seed(0)
    trained = model()
    trained.save_pretrained(tmp_path / "base")
    full_model.train_all_weights(trained)
    with torch.no_grad():
        for weight in trained.parameters():
            weight += 0.01 * torch.randn_like(weight)
    (tmp_path / "model").mkdir()
    full_model.save_model(trained, tmp_path / "model")
    with open_update(tmp_path / "model", tmp_path / "base") as update:
        squares = sum(update[module].inner(update[module]) for module in update.modules)
    assert sum(change for _, change in full_model.matrix_changes(trained)) == pytest.approx(squares, rel=1e-6)
