"""Adapters made elsewhere: what PEFT's configuration may say, which weights are read, and on which base they stand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from losslens.analysis.named_bases import require_one_base
from losslens.core.errors import InputError
from losslens.models.adapters import LoraSettings, initial_adapter, require_targets, with_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.updates import lora_config
from losslens.updates.folder import open_adapter
from tests.conftest import TINY, base_source, script


@pytest.fixture(scope="module")
def plain(base: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA adapter of the tiny student."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with preserved(base.model), torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(base.model, config).save_pretrained(folder)
    return folder


def changed(plain: Path, folder: Path, **values: Any) -> Path:
    """A copy with other values in `adapter_config.json`."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


def moe(folder: Path) -> Path:
    """A tiny mixture of experts with the student's tokenizer."""
    shutil.copytree(TINY / "student", folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config = Qwen3MoeConfig(vocab_size=319, hidden_size=16, intermediate_size=16, eos_token_id=2, **sizes, **experts)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_every_field_of_pefts_configuration_is_decided() -> None:
    """A newer PEFT with a further field is to be looked at before its adapters are read."""
    decided = lora_config._WITHOUT_EFFECT | lora_config._READ | lora_config._WHY.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= decided


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "ADALORA"}, "peft_type=ADALORA"),
        ({"peft_type": "IA3", "lora_alpha": None}, "peft_type=IA3"),
        ({"peft_type": "lora"}, "peft_type=lora"),
        *(
            ({"init_lora_weights": name}, f"init_lora_weights={name}")
            for name in ("OLoRA", "PiSSA", "pissa_niter_4", "CorDA", "loftq", "lora_ga", "GaLore", 1)
        ),
        ({"use_dora": True}, "use_dora=true: a DoRA"),
        ({"use_dora": 1}, "use_dora: 1 is neither"),
        ({"target_parameters": "mlp.experts.down_proj"}, "target_parameters: mlp"),
        ({"target_parameters": ["mlp.experts.down_proj"], "use_dora": True}, "target_parameters with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"bias": "all"}, "bias=all"),
        ({"lora_bias": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"use_something_new": True}, "use_something_new=true: unknown field"),
        ({"lora_alpha": 1e308}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": [1]}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
        ({"rank_pattern": {"(?i)Q_PROJ)": 4}}, "rank_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"target_modules": [["q_proj"]]}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "v_proj is not among the target_modules"),
        ({"r": 8}, "has rank 4, but adapter_config.json says 8"),
        ({"rank_pattern": {"layers.2.self_attn.v_proj": 2}}, "has rank 4, but adapter_config.json says 2"),
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_plain_lora_is_refused_by_name(
    values: dict[str, Any], said: str, plain: Path, tmp_path: Path
) -> None:
    folder = changed(plain, tmp_path / "x", **values)
    with pytest.raises(InputError, match=said) as refused, open_adapter(folder) as adapter:
        for module in adapter.modules:
            adapter[module]
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        *({"init_lora_weights": name} for name in (True, False, None, "gaussian", "Gaussian", "eva", "orthogonal")),
        {"loftq_config": {"loftq_bits": 4}, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"fan_in_fan_out": True, "lora_dropout": 0.1, "layers_to_transform": None, "exclude_modules": ["k_proj"]},
        {"target_modules": r".*\.(q|v)_proj"},
        {"alpha_pattern": {"(.+)+!": 3, "(.*)*[X]": 4, "((.+)+)+Z": 5}},  # Python's own would try them for hours
    ],
)
def test_what_changes_no_update_is_read(values: dict[str, Any], plain: Path, tmp_path: Path) -> None:
    with open_adapter(plain) as one, open_adapter(changed(plain, tmp_path / "x", **values)) as other:
        assert one.modules == other.modules
        assert all(np.array_equal(one[m].dense(), other[m].dense())
                   for m in one.modules)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[" * 200_000, "adapter_config.json"), (b"\xff\xfe", "adapter_config.json"), (b'"x"', "adapter_config.json")],
)
def test_configurations_that_are_none(content: bytes, said: str, plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "x")
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError, match=said), open_adapter(folder):
        pass


def test_pickled_weights_are_not_opened(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "x")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with (
        pytest.raises(InputError, match=r"adapter_model\.bin: pickle files .* save it as safetensors"),
        open_adapter(folder),
    ):
        pass


def test_a_pattern_that_peft_would_try_for_hours_is_not_handed_to_it(
    plain: Path, base: LoadedModel, tmp_path: Path
) -> None:
    x = changed(plain, tmp_path / "x", alpha_pattern={"(.+)+!": 3})
    with pytest.raises(InputError, match="alpha_pattern"), with_adapter(base.model, x):
        pass


def test_an_update_too_large_to_measure_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path / "x", lora_alpha=1e90)
    weights = {k: v.double() * 1e20 for k, v in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors")
    with open_adapter(folder) as adapter, pytest.raises(InputError, match="too large to measure"):
        adapter[adapter.modules[0]]


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian", "use_rslora": True},
        {"rank_pattern": {"0.attn.c_attn": 2}, "alpha_pattern": {r"^.*h\.0\..*": 3, "c_attn": 5}},
    ],
)
def test_a_transposed_base_is_read_as_peft_merges_it(options: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2 stores its weights as (in, out), and PEFT merges ΔWᵀ into them."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **options)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path)
    after = adapted.merge_and_unload().state_dict()
    with open_adapter(tmp_path) as adapter:
        assert len(adapter.modules) == 6
        for module in adapter.modules:
            delta = adapter[module]
            merged = (after[f"{module}.weight"] - before[f"{module}.weight"]).double().numpy().T
            assert np.allclose(delta.dense(), merged, atol=1e-6)


def test_experts_are_refused_as_linear_modules_and_before_training(tmp_path: Path) -> None:
    """One product over all experts would be .514 long where the merged update is 1.119 (four experts)."""
    source = base_source(path=str(moe(tmp_path / "moe")))
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "moe")
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    # Without that field, it is no plain LoRA by its weights.
    changed(tmp_path / "a", tmp_path / "b", target_parameters=None, target_modules=None)
    with pytest.raises(InputError, match="experts"), open_adapter(tmp_path / "b") as adapter:
        adapter["model.layers.0.mlp.experts"]
    with pytest.raises(InputError, match=r"model\.target_modules=all_linear: .*experts.*target_parameters"):
        require_targets(source, LoraSettings(2, 4.0, 0.0, "all_linear"))
    require_targets(source, LoraSettings(2, 4.0, 0.0, "attention"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's word on lm_head, before the refusal
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "norm", "mlp", "nowhere"])
def test_modules_that_are_not_linear_are_refused_by_the_option(name: str, base: LoadedModel, tmp_path: Path) -> None:
    settings = LoraSettings(4, 8.0, 0.0, ("q_proj", name))
    with pytest.raises(InputError, match=r"^model\.target_modules: ") as refused:
        require_targets(base_source(), settings)
    assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"^model\.target_modules: "):
        initial_adapter(tmp_path, {"sha256": "test"}, base.model, settings, init_seed=1)
    assert not [folder for folder in (tmp_path / "init").iterdir() if folder.is_dir()]


def test_nothing_is_sampled_for_modules_that_cannot_be_adapted(tmp_path: Path) -> None:
    outcome = script(
        "train.py", "method=sft", "model.target_modules=[q_proj,embed_tokens]", "logger=none",
        f"output_dir={tmp_path}", check=2,
    )  # fmt: skip
    assert outcome.stderr.count("\n") == 1
    assert "model.target_modules: model.embed_tokens is not a linear module" in outcome.stderr
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and ".hydra" not in file.parts]


class TestBases:
    """The base that an adapter names, against the one it is compared on."""

    def test_another_one_is_refused(self, plain: Path, tmp_path: Path) -> None:
        other = tmp_path / "other_base"
        shutil.copytree(TINY / "student", other)
        weights = load_file(other / "model.safetensors")
        first = next(iter(weights))
        weights[first] = weights[first] + 1
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        x = changed(plain, tmp_path / "x", base_model_name_or_path=str(other))
        left_out: dict[str, str] = {}
        for runs, model_path in ((None, None), (None, str(TINY / "student"))):
            with pytest.raises(InputError, match=r"adapters\.x: trained on a different base"):
                require_one_base({"plain": plain, "x": x}, runs, model_path, left_out)
        assert left_out == {}

    def test_a_copy_elsewhere_is_the_same_one(self, plain: Path, tmp_path: Path) -> None:
        shutil.copytree(TINY / "student", tmp_path / "copy")
        x = changed(plain, tmp_path / "x", base_model_name_or_path=str(tmp_path / "copy"))
        left_out: dict[str, str] = {}
        require_one_base({"plain": plain, "x": x}, None, None, left_out)
        assert left_out == {}

    @pytest.mark.parametrize(
        ("first", "second", "same"),
        [
            (("a/base", None), ("A/Base", None), True),
            (("a/base", "1" * 40), ("b/base", "1" * 40), False),
            (("a/base", "1" * 40), ("models/llama", None), None),  # a folder where it was made?
            (("models/llama", None), ("a/base", "main"), None),
            (("a/base", "1" * 40), ("a/base", "2" * 40), False),
            (("a/base", "1" * 40), ("a/base", None), True),
        ],
    )
    def test_of_the_hub_by_id_and_commit(
        self, first: tuple, second: tuple, same: bool | None, plain: Path, tmp_path: Path
    ) -> None:
        x, y = (
            changed(plain, tmp_path / label, base_model_name_or_path=name, revision=revision)
            for label, (name, revision) in (("x", first), ("y", second))
        )
        if same is not False:
            left_out: dict[str, str] = {}
            require_one_base({"x": x, "y": y}, None, None, left_out)
            assert list(left_out) == ([] if same else ["the base of y"])
            return
        with pytest.raises(InputError, match=r"adapters\.y: trained on a different base"):
            require_one_base({"x": x, "y": y}, None, None, {})

    @pytest.mark.parametrize("name", ["someone/another-base", "/no/such/folder", None])
    def test_what_cannot_be_told_is_said(self, name: str | None, plain: Path, tmp_path: Path) -> None:
        x = changed(plain, tmp_path / "x", base_model_name_or_path=name)
        left_out: dict[str, str] = {}
        require_one_base({"plain": plain, "x": x}, None, None, left_out)
        assert list(left_out) == ["the base of x"]
