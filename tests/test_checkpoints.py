"""Updates that need their base: checkpoints, DoRA; and the experts of PEFT, against PEFT's own merging."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.linalg import subspace_angles
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import losslens
from losslens.analysis.cohort import SweepContents
from losslens.analysis.function_space import base_at
from losslens.analysis.gathering import gather_cohort
from losslens.core.errors import InputError
from losslens.measures.comparison import compare
from losslens.updates.checkpoint import Checkpoint, open_update
from losslens.updates.dense import DenseUpdate
from losslens.updates.folder import open_adapter
from losslens.updates.lora import LoraUpdate

pytestmark = pytest.mark.fast

Q = "model.layers.0.self_attn.q_proj"
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 20, "max_position_embeddings": 32,
}  # fmt: skip


def model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True, **settings}))


def disturbed(base: Path, folder: Path, size: float = 0.01) -> dict[str, torch.Tensor]:
    """Writes a copy of a checkpoint with every weight changed; returns the weights."""
    generator = torch.Generator().manual_seed(1)
    weights = load_file(base / "model.safetensors")
    weights = {name: w + size * torch.randn(w.shape, generator=generator) for name, w in sorted(weights.items())}
    written(weights, folder, base)
    return weights


def written(weights: dict[str, torch.Tensor], folder: Path, base: Path) -> None:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text((base / "config.json").read_text())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_update_is_the_difference_of_the_linear_modules(base: Path, tmp_path: Path) -> None:
    """Without embeddings, head and norms, as PEFT's all-linear."""
    now, before = disturbed(base, tmp_path / "a"), load_file(base / "model.safetensors")
    adapted = get_peft_model(model(), LoraConfig(r=1, target_modules="all-linear"))
    linear = {name.split(".base_layer")[0].removeprefix("base_model.model.")
              for name, _ in adapted.named_modules() if name.endswith("base_layer")}  # fmt: skip
    with open_update(tmp_path / "a", base) as update:
        assert update.modules == sorted(linear)
        for module in update.modules:
            name = f"{module}.weight"
            expected = (now[name].double() - before[name].double()).numpy()
            assert np.array_equal(update[module].dense(), expected)
            assert update.shapes[module] == expected.shape
            assert update.ranks[module] == min(expected.shape)


def test_composition_by_hand(base: Path, tmp_path: Path) -> None:
    """2 in one weight of q, 3 in one of a norm, 6 in one of the embeddings: 4 inside, 9 + 36 outside."""
    weights = load_file(base / "model.safetensors")
    weights[f"{Q}.weight"][3, 2] += 2
    weights["model.norm.weight"][1] += 3
    weights["model.embed_tokens.weight"][7, 0] += 6
    written(weights, tmp_path / "a", base)
    with open_update(tmp_path / "a", base) as update:
        assert isinstance(update, Checkpoint)
        found = update.composition(update.modules)
        assert found.inside == pytest.approx(4, rel=1e-6)
        assert found.outside == pytest.approx(45, rel=1e-6)
        assert found.rounding == 0
        other = update.composition([module for module in update.modules if module != Q])
        assert (other.inside, other.outside) == pytest.approx((0, 49), rel=1e-6)


def test_the_rounding_of_bf16_by_hand(base: Path, tmp_path: Path) -> None:
    """Between 1 and 2 neighbouring bf16 values are 2⁻⁷ apart: the mean squared error of rounding is 2⁻¹⁴/12.

    That is 256·2⁻¹⁴/12 for 16 × 16 weights there; of weights drawn at random, within sampling.
    """
    weights = {name: 0 * w for name, w in load_file(base / "model.safetensors").items()}
    values = 1 + torch.rand(16, 16, generator=torch.Generator().manual_seed(3))
    written({**weights, f"{Q}.weight": values}, tmp_path / "exact", base)
    written({**weights, f"{Q}.weight": values.bfloat16()}, tmp_path / "rounded", base)
    with open_update(tmp_path / "rounded", tmp_path / "exact") as update:
        assert isinstance(update, Checkpoint)
        found = update.composition([Q])
    assert found.rounding == pytest.approx(256 * 2.0**-14 / 12, rel=1e-12)
    assert found.inside == pytest.approx(found.rounding, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_are_one_file(dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    """Each as transformers writes it, in each precision, to the last bit."""
    disturbed(base, tmp_path / "a")
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    whole.save_pretrained(tmp_path / "one")
    whole.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    with open_update(tmp_path / "one", base) as one, open_update(tmp_path / "shards", base) as shards:
        assert one.modules == shards.modules
        for module in one.modules:
            stored = whole.get_submodule(module).weight.detach().double().numpy()
            before = load_file(base / "model.safetensors")[f"{module}.weight"].double().numpy()
            assert np.array_equal(one[module].dense(), stored - before)
            assert np.array_equal(shards[module].dense(), stored - before)


def test_a_tied_head_counts_once(base: Path, tmp_path: Path) -> None:
    """A file with the head written out beside the tied embeddings is the same model."""
    weights = disturbed(base, tmp_path / "tied")
    head = weights["model.embed_tokens.weight"].clone()
    written({**weights, "lm_head.weight": head}, tmp_path / "written out", base)
    with open_update(tmp_path / "tied", base) as tied, open_update(tmp_path / "written out", base) as out:
        assert isinstance(tied, Checkpoint)
        assert isinstance(out, Checkpoint)
        assert tied.modules == out.modules
        assert out.composition(tied.modules) == tied.composition(tied.modules)


def test_a_head_that_is_not_tied_may_not_be_missing(base: Path, tmp_path: Path) -> None:
    weights = disturbed(base, tmp_path / "a")
    written({name: w for name, w in weights.items() if name != "lm_head.weight"}, tmp_path / "b", base)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(InputError, match="has no lm_head, although"), open_update(tmp_path / "b", base):
        pass


def test_weights_of_gpt2_lie_the_other_way_round(tmp_path: Path) -> None:
    """The share that is not compared is that of all tensors, as brute force has it."""
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=16)
    torch.manual_seed(0)
    for name in ("base", "trained"):
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "trained"))
    squares = {name: float((second[name].double() - w.double()).square().sum()) for name, w in first.items()}
    with open_update(tmp_path / "trained", tmp_path / "base") as found:
        assert isinstance(found, Checkpoint)
        assert found.shapes["transformer.h.0.mlp.c_fc"] == (32, 8)
        whole = found.composition(found.modules)
    linear = ("c_fc.weight", "c_attn.weight", "c_proj.weight")
    inside = sum(value for name, value in squares.items() if name.endswith(linear))
    assert whole.inside == pytest.approx(inside, rel=1e-9)
    assert whole.outside == pytest.approx(sum(squares.values()) - inside, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("model.norm.weight", lambda w: w[:4], "model.norm has another shape than in"),
        ("model.embed_tokens.weight", lambda w: w[:, :4], "model.embed_tokens has another shape than in"),
        (f"{Q}.weight", lambda w: w.double() * 1e300, "more than 1e\\+100 is an error"),
    ],
)
def test_what_no_comparison_could_tell(
    name: str, change: Callable[[Any], Any], said: str, base: Path, tmp_path: Path
) -> None:
    weights = disturbed(base, tmp_path / "a")
    written({**weights, name: change(weights[name]).contiguous()}, tmp_path / "b", base)
    with pytest.raises(InputError, match=said), open_update(tmp_path / "b", base) as found:
        found[Q]


def test_names_of_two_tensors_that_are_one(base: Path, tmp_path: Path) -> None:
    weights = disturbed(base, tmp_path / "a")
    both = {**weights, "_orig_mod.model.norm.weight": weights["model.norm.weight"].clone()}
    written(both, tmp_path / "b", base)
    with pytest.raises(InputError, match=r"model\.norm\.weight occurs twice"), open_update(tmp_path / "b", base):
        pass


def test_names_without_their_prefix(base: Path, tmp_path: Path) -> None:
    """A model without its head is saved as `layers.…`; torch.compile puts `_orig_mod.` before each name."""
    weights = disturbed(base, tmp_path / "a")
    written({name.removeprefix("model."): w for name, w in weights.items()}, tmp_path / "bare", base)
    written({f"_orig_mod.{name}": w for name, w in weights.items()}, tmp_path / "compiled", base)
    with open_update(tmp_path / "a", base) as expected:
        for folder in ("bare", "compiled"):
            with open_update(tmp_path / folder, base) as found:
                assert found.modules == expected.modules
                assert np.array_equal(found[Q].dense(), expected[Q].dense())


@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "dora"])
def test_an_adapter_is_its_merged_checkpoint(kind: str, tmp_path: Path) -> None:
    """PEFT merges in float64 here; all figures of the comparison are equal, too."""
    adapters, merged = [], []
    model().double().save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        config = LoraConfig(
            r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=kind == "rslora",
            use_dora=kind == "dora", rank_pattern={"layers.1.*q_proj": 5} if kind == "patterns" else {},
            alpha_pattern={"down_proj": 9} if kind == "patterns" else {},
        )  # fmt: skip
        adapted = get_peft_model(model().double(), config)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = weight.data.double()
                weight.data += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.double)
        adapted.save_pretrained(tmp_path / f"adapter{seed}")
        # As it is read: saved, and loaded by PEFT.
        again = PeftModel.from_pretrained(model().double(), tmp_path / f"adapter{seed}", autocast_adapter_dtype=False)
        again.double().merge_and_unload().save_pretrained(tmp_path / f"merged{seed}")
        adapters.append(tmp_path / f"adapter{seed}")
        merged.append(tmp_path / f"merged{seed}")
    base = tmp_path / "base"
    with (
        open_update(adapters[0], base) as first, open_update(adapters[1], base) as second,
        open_update(merged[0], base) as third, open_update(merged[1], base) as fourth,
    ):  # fmt: skip
        modules = first.modules
        assert len(modules) == 4
        for module in modules:
            assert isinstance(first[module], DenseUpdate if kind == "dora" else LoraUpdate)
            assert np.allclose(first[module].dense(), third[module].dense(), rtol=0, atol=1e-12)
        runs, pairs = compare([first, second, third, fourth], modules, top=3)
    for name in ("inner", "right_overlap", "angles_left", "angles_right", "u1", "v1"):
        expected = getattr(pairs[0, 1], name)
        for pair in ((2, 3), (0, 3), (1, 2)):
            assert np.allclose(getattr(pairs[pair], name), expected, rtol=1e-7, atol=1e-7), (name, pair)
    for lora, dense in ((0, 2), (1, 3)):
        rank = runs[lora].singular_values.shape[1]
        expected, found = runs[lora].singular_values, runs[dense].singular_values[:, :rank]
        assert np.allclose(np.nan_to_num(expected), np.nan_to_num(found), atol=1e-9)


def test_dora_by_hand(tmp_path: Path) -> None:
    """A row (3, 4) and B·A of 0, with a norm of 10, doubles: ΔW is the row itself."""
    weights = {"model.layers.0.q_proj.weight": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    key = "base_model.model.model.layers.0.q_proj.lora_"
    factors = {"A.weight": torch.ones(1, 2), "B.weight": torch.zeros(2, 1), "magnitude_vector": torch.tensor([10, 2.0])}
    (tmp_path / "a").mkdir()
    save_file({f"{key}{name}": value for name, value in factors.items()}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1, "use_dora": True}))
    with open_update(tmp_path / "a", tmp_path / "base") as update:
        assert update["model.layers.0.q_proj"].dense() == pytest.approx(np.array([[3, 4], [0, 0]]))
    with pytest.raises(InputError, match=r"a: the update of a DoRA adapter depends on the base; give model_path"):
        open_update(tmp_path / "a", None).__enter__()
    with pytest.raises(InputError, match="use_dora=true: a DoRA adapter"):
        open_adapter(tmp_path / "a").__enter__()


def moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    settings = {"moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **settings))


# PEFT looks for the pattern among target_modules alone, and follows it nevertheless.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_experts_are_merged_as_peft_does(targets: list[str], tmp_path: Path) -> None:
    names = [f"mlp.experts.{name}" for name in targets]
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=[*names, "mlp.gate.weight"],
        rank_pattern={r".*experts\.down_proj": 3},
    )  # fmt: skip
    adapted = get_peft_model(moe(), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path / "a")
    moe().save_pretrained(tmp_path / "base")
    before = dict(moe().named_parameters())
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")  # a tensor for each expert
    after = dict(merged.named_parameters())
    with open_update(tmp_path / "a", None) as update, open_update(tmp_path / "merged", tmp_path / "base") as whole:
        assert len(update.modules) == 2 * (3 * len(targets) + 2)
        for module in update.modules:
            match = re.fullmatch(r"(.*)\[(\d)\]", module)
            name = match[1] if match else f"{module}.weight"
            change = (after[name].double() - before[name].double()).detach().numpy()
            change = change[int(match[2])] if match else change
            assert np.allclose(update[module].dense(), change, atol=1e-6), module
            assert update.shapes[module] == change.shape
            assert update.ranks[module] == update[module].rank == (3 if "down_proj" in module else 2)
            assert np.array_equal(whole[module].dense(), change), module
            assert whole.shapes[module] == change.shape
        assert len([module for module in whole.modules if "experts" in module]) == 2 * 2 * 3


def test_experts_of_which_the_order_is_unknown_are_refused(tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.experts.lora_"
    (tmp_path / "a").mkdir()
    save_file({f"{key}A.weight": torch.ones(2, 2), f"{key}B.weight": torch.ones(2, 2)},
              tmp_path / "a" / "adapter_model.safetensors")  # fmt: skip
    config = {"r": 1, "lora_alpha": 1, "target_parameters": ["experts.w1", "experts.w2"]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"several of model\.layers\.0\.experts, in an unknown order"):
        open_update(tmp_path / "a", None).__enter__()
    config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has 1 pairs of factors for gate_up_proj, down_proj"):
        open_update(tmp_path / "a", None).__enter__()


@pytest.mark.parametrize("shape", [(700, 600), (600, 700)], ids=["tall", "wide"])
def test_a_large_update_against_numpy(shape: tuple[int, int]) -> None:
    """Beyond the size of the exact SVD: values, subspaces, products."""
    rng = np.random.default_rng(5)
    u, v = (np.linalg.qr(rng.standard_normal((n, 600)))[0] for n in shape)
    spectra = np.geomspace(3, 1e-4, 600), np.linspace(2, 0.1, 600)
    matrices = [(u * spectra[0]) @ v.T, (np.roll(u, 3, axis=1) * spectra[1]) @ v.T + rng.standard_normal(shape) * 1e-3]
    updates = [DenseUpdate(matrix) for matrix in matrices]
    for matrix, update in zip(matrices, updates, strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        found = update.svd(10)
        assert np.allclose(found.values, values[: len(found.values)], rtol=0, atol=1e-7 * values[0])
        assert len(found.values) == 600
        assert np.allclose(found.values[:10], values[:10], rtol=1e-12)
        assert np.allclose(found.left.T @ found.left, np.eye(10), atol=1e-12)
        assert subspace_angles(found.left, left[:, :10]).max() < 1e-6
        assert subspace_angles(found.right, right[:10].T).max() < 1e-6
        reached = (found.left * found.values[:10]) @ found.right.T
        assert np.allclose(reached, (left[:, :10] * values[:10]) @ right[:10], atol=1e-8)
    assert updates[0].inner(updates[1]) == pytest.approx(np.sum(matrices[0] * matrices[1]), rel=1e-10)
    expected = np.linalg.norm(matrices[0] @ matrices[1].T) ** 2
    assert updates[0].right_overlap(updates[1]) == pytest.approx(expected, rel=1e-10)
    assert updates[0].left_rotated(rng) is None


def test_a_large_update_of_low_rank_or_0() -> None:
    """Rank 4: no more than four directions, and those of LoRA; a zero update has none."""
    rng = np.random.default_rng(6)
    lora = LoraUpdate(rng.standard_normal((700, 4)), rng.standard_normal((4, 600)), 0.5)
    expected, found = lora.svd(10), DenseUpdate(lora.dense()).svd(10)
    assert np.allclose(found.values, expected.values, rtol=1e-10)
    assert subspace_angles(found.left, expected.left).max() < 1e-6
    assert subspace_angles(found.right, expected.right).max() < 1e-6
    zero = DenseUpdate(np.zeros((700, 600))).svd(10)
    assert (zero.left.shape, zero.values.shape, zero.right.shape) == ((700, 0), (0,), (600, 0))
    assert DenseUpdate(lora.dense()).inner(lora) == pytest.approx(lora.inner(lora), rel=1e-10)


def test_a_rotated_copy_keeps_spectrum_and_inputs() -> None:
    update = DenseUpdate(np.random.default_rng(7).standard_normal((9, 6)))
    copy = update.left_rotated(np.random.default_rng(8))
    assert copy is not None
    assert np.allclose(copy.dense().T @ copy.dense(), update.dense().T @ update.dense())
    assert not np.allclose(copy.dense(), update.dense())


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    names = {"q": f"{Q}.weight", "more": "model.more.weight"}
    weights |= {names[name]: value for name, value in tensors.items() if value is not None}
    weights = {name: w for name, w in weights.items() if not (tensors.get("q", w) is None and name == names["q"])}
    save_file(weights, folder / "model.safetensors")


def test_what_cannot_be_compared_ends_in_one_line(base: Path, tmp_path: Path) -> None:
    def refused(name: str) -> str:
        with pytest.raises(InputError) as caught, open_update(tmp_path / name, base) as update:
            for module in update.modules:
                update[module]
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in ("shape", "fewer", "more", "nan", "whole"):
        disturbed(base, tmp_path / name)
    change(tmp_path / "shape", q=torch.zeros(8, 16))
    change(tmp_path / "fewer", q=None)
    change(tmp_path / "more", more=torch.zeros(2, 2))
    change(tmp_path / "nan", q=torch.full((16, 16), torch.nan))
    assert f"{Q} has another shape than in {base} (8 × 16 and 16 × 16)" in refused("shape")
    assert f"fewer: has no {Q}.weight, which {base} has: another architecture" in refused("fewer")
    assert "has no model.more.weight" in refused("more")
    assert f"nan: {Q}.weight contains non-finite values" in refused("nan")
    with pytest.raises(InputError, match=r"a whole model is compared with its base; give model_path=FOLDER"):
        open_update(tmp_path / "whole", None).__enter__()
    (tmp_path / "whole" / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refused("whole")
    (tmp_path / "whole" / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in refused("whole")
    index = tmp_path / "whole" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{Q}.weight": "model-00001-of-00001.safetensors"}}))
    assert "model-00001-of-00001.safetensors: no such file" in refused("whole")
    index.write_text(json.dumps({"weight_map": {f"{Q}.weight": "../model.safetensors"}}))
    assert "is not a file beside it" in refused("whole")
    index.write_text("[]")
    assert "index.json: not a mapping" in refused("whole")


def lora(folder: Path, targets: list[str] | str, seed: int, **settings: Any) -> Path:
    """Writes an adapter of the tiny model with random factors."""
    adapted = get_peft_model(model(), LoraConfig(r=2, lora_alpha=2, target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def test_a_mix_is_compared_on_the_modules_of_its_adapters(base: Path, tmp_path: Path) -> None:
    """LoRA and DoRA on q, and a whole model: the cosines of the four q, and the share of the rest of the model."""
    weights, before = disturbed(base, tmp_path / "whole"), load_file(base / "model.safetensors")
    folders = {
        "lora": lora(tmp_path / "lora", ["q_proj"], 1),
        "dora": lora(tmp_path / "dora", ["q_proj"], 2, use_dora=True),
        "whole": tmp_path / "whole",
    }
    found = losslens.compare(folders, base=base)
    with open_update(folders["lora"], None) as first, open_update(folders["dora"], base) as second:
        changes = {
            label: np.concatenate([update[module].dense().ravel() for module in first.modules])
            for label, update in (("lora", first), ("dora", second))
        }
        names = [f"{module}.weight" for module in first.modules]
    differences = {name: (weights[name].double() - w.double()).numpy() for name, w in before.items()}
    changes["whole"] = np.concatenate([differences[name].ravel() for name in names])
    for a, b, cosine in zip(found.pairs["run_a"], found.pairs["run_b"], found.pairs["cosine"], strict=True):
        expected = changes[a] @ changes[b] / np.linalg.norm(changes[a]) / np.linalg.norm(changes[b])
        assert cosine == pytest.approx(expected, abs=1e-9)
    norms = found.runs.set_index("run")["norm"]
    for label, change in changes.items():
        assert norms[label] == pytest.approx(np.linalg.norm(change), rel=1e-9)
    squares = {name: float((d**2).sum()) for name, d in differences.items()}
    share = 1 - sum(squares[name] for name in names) / sum(squares.values())
    assert f"{100 * share:.2g}% of the squared norm" in found.left_out["further weights of whole"]
    assert "model.layers.0.mlp.down_proj" in found.left_out["further modules of whole"]
    with pytest.raises(InputError, match=r"the update of a DoRA adapter depends on the base; .*base=FOLDER"):
        losslens.compare(folders)
    with pytest.raises(InputError, match=r"a whole model is compared with its base; .*base=FOLDER"):
        losslens.compare({label: folders[label] for label in ("lora", "whole")})


def test_two_checkpoints_have_a_symmetric_comparison_that_scales(base: Path, tmp_path: Path) -> None:
    """Exchanging the two exchanges the rows; doubling an update doubles its norm and turns nothing."""
    weights, before = disturbed(base, tmp_path / "a"), load_file(base / "model.safetensors")
    doubled = {name: (2 * w.double() - before[name].double()) for name, w in weights.items()}
    written(doubled, tmp_path / "b", base)
    found = losslens.compare([tmp_path / "a", tmp_path / "b"], base=base)
    turned = losslens.compare([tmp_path / "b", tmp_path / "a"], base=base)
    [row], [same] = found.pairs.to_dict("records"), turned.pairs.to_dict("records")
    assert row["cosine"] == pytest.approx(1, abs=1e-12)
    assert row["cosine"] == pytest.approx(same["cosine"], abs=1e-12)
    one, two = found.runs["norm"]
    assert two == pytest.approx(2 * one, rel=1e-6)
    assert "further weights of a" in found.left_out
    assert "an exact update of a" not in found.left_out


def test_an_update_below_bf16_is_told(base: Path, tmp_path: Path) -> None:
    weights = disturbed(base, tmp_path / "a", 1e-5)
    written({name: w.bfloat16() for name, w in weights.items()}, tmp_path / "b", base)
    found = losslens.compare([tmp_path / "a", tmp_path / "b"], base=base)
    assert "an exact update of a" not in found.left_out
    share = float(re.search(r"with (\d+)% of the squared norm", found.left_out["an exact update of b"])[1])
    assert 60 < share < 160


def test_the_same_checkpoint_is_another_update_to_another_base(base: Path, tmp_path: Path) -> None:
    """A cache that knew the checkpoint alone would answer with the first base's figures."""
    disturbed(base, tmp_path / "a")
    disturbed(base, tmp_path / "other", 0.02)
    nothing = SweepContents([], [], [], set(), "", {})
    keys = {
        gather_cohort(nothing, {"a": tmp_path / "a"}, base_at(str(start))).members[0].sha256
        for start in (base, tmp_path / "other")
    }
    assert len(keys) == 2


@pytest.mark.parametrize("size", [(9, 6), (700, 600)])
def test_products_with_vectors(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(9)
    factors = LoraUpdate(rng.standard_normal((size[0], 3)), rng.standard_normal((3, size[1])), 0.5)
    matrix = factors.dense()
    x, y = rng.standard_normal((size[1], 2)), rng.standard_normal((size[0], 2))
    for update in (factors, DenseUpdate(matrix)):
        assert np.allclose(update.on_inputs(x), matrix @ x)
        assert np.allclose(update.on_outputs(y), matrix.T @ y)
