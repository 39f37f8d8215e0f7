"""Factor-space geometry against the dense computation, and what must not change it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from losslens.core.errors import InputError
from losslens.measures.definitions.weight_space import cosine, effective_rank, orthogonal_share, stable_rank
from losslens.measures.tables import layer_of
from losslens.models.adapters import save_adapter
from losslens.models.loading import LoadedModel, preserved
from losslens.updates.base import pair_products
from losslens.updates.folder import open_adapter
from losslens.updates.lora import LoraUpdate
from tests.measure_views import pair_of

pytestmark = pytest.mark.fast

SHAPES = st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))


def random_delta(rng: np.random.Generator, out: int, into: int, rank: int) -> LoraUpdate:
    return LoraUpdate(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), float(rng.uniform(0.1, 3)))


def inner_product(first: LoraUpdate, second: LoraUpdate) -> float:
    return pair_products([first, second], fresh=1)[0][0]


def singular_values(delta: LoraUpdate) -> np.ndarray:
    return delta.svd().values


@given(SHAPES)
@settings(deadline=None)
def test_equals_the_dense_computation(shape: tuple[int, int, int, int, int]) -> None:
    out, into, rank, other_rank, seed = shape
    rng = np.random.default_rng(seed)
    first, second = random_delta(rng, out, into, rank), random_delta(rng, out, into, other_rank)
    full, other = first.dense(), second.dense()
    size = np.linalg.norm(full) * np.linalg.norm(other)
    assert abs(inner_product(first, second) - np.sum(full * other)) < 1e-12 * size
    assert abs(inner_product(first, second) - inner_product(second, first)) < 1e-12 * size
    values = singular_values(first)
    assert np.allclose(values, np.linalg.svd(full, compute_uv=False)[:rank], rtol=1e-10)
    assert math.isclose(inner_product(first, first), np.sum(values**2), rel_tol=1e-10)


@given(SHAPES)
@settings(deadline=None)
def test_a_change_of_gauge_changes_nothing(shape: tuple[int, int, int, int, int]) -> None:
    """B → BG, A → G⁻¹A leaves ΔW as it is."""
    out, into, rank, _, seed = shape
    rng = np.random.default_rng(seed)
    delta, other = random_delta(rng, out, into, rank), random_delta(rng, out, into, rank)
    gauge = np.linalg.qr(rng.standard_normal((rank, rank)))[0] * rng.uniform(0.5, 2, rank)
    moved = LoraUpdate(delta.b @ gauge, np.linalg.inv(gauge) @ delta.a, delta.scale)
    assert math.isclose(inner_product(moved, other), inner_product(delta, other), rel_tol=1e-9, abs_tol=1e-9)
    assert np.allclose(singular_values(moved), singular_values(delta))


def cosines(inner: float, norm: float, other_norm: float) -> tuple[float, float]:
    """The cosine of two updates of one module, and their orthogonal share."""
    pair = pair_of([(1, 1)], ([norm], [other_norm]), inner=[inner])
    value = cosine(pair)
    return value.item(), orthogonal_share(value).item()


def test_by_hand() -> None:
    """ΔW₁ = 2·e₁e₁ᵀ + 2·e₂e₂ᵀ, ΔW₂ = 3·e₁e₁ᵀ: inner product 6, norms √8 and 3, cosine 6/(3·√8) = 1/√2."""
    eye = np.eye(4)
    first = LoraUpdate(eye[:, :2], eye[:2], 2.0)
    second = LoraUpdate(eye[:, :1], eye[:1], 3.0)
    assert inner_product(first, second) == 6
    assert cosines(6, math.sqrt(8), 3) == pytest.approx((1 / math.sqrt(2), 1 / math.sqrt(2)))
    assert cosines(1 + 1e-15, 1, 1)[1] == 0
    assert singular_values(first) == pytest.approx([2, 2])
    assert effective_rank(np.array([2.0, 2.0])) == pytest.approx(2)
    assert stable_rank(np.array([2.0, 2.0])) == pytest.approx(2)
    # σ = 3, 1: shares ¾, ¼; entropy ln 4 − ¾·ln 3; exp of it 4/3^¾. Stable rank (9 + 1)/9.
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)
    assert stable_rank(np.array([3.0, 1.0])) == pytest.approx(10 / 9)


def test_an_update_of_zero_has_no_direction() -> None:
    zero = np.zeros(3)
    assert math.isnan(effective_rank(zero))
    assert math.isnan(stable_rank(zero))
    assert np.isnan(cosines(0.0, 0.0, 1.0)).all()
    assert math.isnan(effective_rank(np.zeros(0)))
    assert math.isnan(stable_rank(np.zeros(0)))


def test_the_orthogonal_part_is_what_is_left_of_the_projection() -> None:
    """‖Δ − (⟨Δ, R⟩/⟨R, R⟩)·R‖/‖Δ‖, densely; its square and the cosine's add up to 1."""
    rng = np.random.default_rng(5)
    first, second = random_delta(rng, 30, 20, 4), random_delta(rng, 30, 20, 6)
    full, other = first.dense(), second.dense()
    value, share = cosines(inner_product(first, second), float(np.linalg.norm(full)), float(np.linalg.norm(other)))
    rest = full - np.sum(full * other) / np.sum(other**2) * other
    assert share == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(full), rel=1e-12)
    assert share**2 + value**2 == pytest.approx(1, abs=1e-15)


class TestAdapterFolders:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True},
            {"alpha_pattern": {"q_proj": 3}},
            pytest.param(
                {"alpha_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5, "_proj": 7, "self_attn": 9}},
                # PEFT warns of the two that are no module's name: that they do nothing is what is tested.
                marks=pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning"),
            ),
            {"alpha_pattern": {r"layers\.[0-2]\..*_proj": -3}},
            {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
        ],
    )
    def test_the_update_is_what_peft_would_merge(self, options: dict, base: LoadedModel, tmp_path: Path) -> None:
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
        with preserved(base.model):
            model = get_peft_model(base.model, config)
            save_adapter(model, tmp_path)
            deltas = {
                name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double().numpy()
                for name, module in model.named_modules()
                if hasattr(module, "get_delta_weight")
            }
        with open_adapter(tmp_path) as adapter:
            assert adapter.modules == sorted(deltas)
            for name, expected in deltas.items():
                assert np.allclose(adapter[name].dense(), expected, atol=1e-6)

    def write(self, folder: Path, **weights: torch.Tensor) -> None:
        save_file(
            {name.replace("__", "."): value for name, value in weights.items()}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_every_precision_is_read_exactly(self, dtype: torch.dtype, tmp_path: Path) -> None:
        a, b = torch.randn(2, 5).to(dtype), torch.randn(4, 2).to(dtype)
        self.write(tmp_path, m__lora_A__weight=a, m__lora_B__weight=b)
        with open_adapter(tmp_path) as adapter:
            assert np.array_equal(adapter["m"].a, a.double().numpy())
            assert np.array_equal(adapter["m"].b, b.double().numpy())
            assert adapter["m"].scale == 1
            assert adapter.shapes == {"m": (4, 5)}
            assert adapter.ranks == {"m": 2}

    def test_several_files(self, tmp_path: Path) -> None:
        """The factors of one module may lie in different files; a missing file is named."""
        weights = {f"{m}__lora_{f}__weight": torch.randn(3, 3) for m in "mn" for f in "AB"}
        whole, shards = tmp_path / "whole", tmp_path / "shards"
        for folder in (whole, shards):
            folder.mkdir()
        self.write(whole, **weights)
        parts = [dict(list(weights.items())[:1]), dict(list(weights.items())[1:])]
        for number, part in enumerate(parts, 1):
            self.write(shards, **part)
            name = f"adapter_model-0000{number}-of-00002.safetensors"
            (shards / "adapter_model.safetensors").rename(shards / name)
        with open_adapter(whole) as one, open_adapter(shards) as several:
            assert one.modules == several.modules == ["m", "n"]
            for module in "mn":
                assert np.array_equal(one[module].dense(), several[module].dense())
        (shards / "adapter_model-00001-of-00002.safetensors").unlink()
        with pytest.raises(InputError, match="shard 1 of 2 is missing"), open_adapter(shards):
            pass
        shutil.copy(
            shards / "adapter_model-00002-of-00002.safetensors", shards / "adapter_model-00001-of-00002.safetensors"
        )
        with pytest.raises(InputError, match="occurs twice"), open_adapter(shards):
            pass
        (shards / "adapter_model-00002-of-00002.safetensors").unlink()
        with pytest.raises(InputError, match="shard 2 of 2 is missing"), open_adapter(shards):
            pass

    def test_what_is_no_lora(self, tmp_path: Path) -> None:
        self.write(tmp_path, m__weight=torch.ones(1, 1))
        with pytest.raises(InputError, match=r"m\.weight is not a LoRA factor"), open_adapter(tmp_path):
            pass
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, "use_dora": True}))
        with pytest.raises(InputError, match="DoRA"), open_adapter(tmp_path):
            pass
        (tmp_path / "adapter_config.json").write_text(json.dumps([1]))
        with pytest.raises(InputError, match="no lora_alpha"), open_adapter(tmp_path):
            pass
        self.write(tmp_path, m__lora_A__weight=torch.ones(2, 3), m__lora_B__weight=torch.ones(3, 1))
        with open_adapter(tmp_path) as adapter, pytest.raises(InputError, match="m: the shapes"):
            adapter["m"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"lora_alpha": float("nan")},
            {"lora_alpha": "3"},
            {"alpha_pattern": {"q_proj": "3"}},
            {"alpha_pattern": {"q_proj(": 3}},
            {"alpha_pattern": [3]},
            {"init_lora_weights": "pissa_niter_4"},
            {"alora_invocation_tokens": [1, 2]},
        ],
    )
    def test_configurations_that_say_no_scale_or_another_update(self, changes: dict, tmp_path: Path) -> None:
        self.write(tmp_path, m__lora_A__weight=torch.ones(1, 1), m__lora_B__weight=torch.ones(1, 1))
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2, **changes}))
        with pytest.raises(InputError, match=r"adapter_config\.json"), open_adapter(tmp_path):
            pass

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
    def test_not_finite(self, value: str, tmp_path: Path) -> None:
        factor = torch.tensor([[float(value), -float(value)]])
        self.write(tmp_path, m__lora_A__weight=factor, m__lora_B__weight=torch.ones(1, 1))
        with (
            open_adapter(tmp_path) as adapter,
            pytest.raises(InputError, match=r"m.lora_A.weight contains non-finite values"),
        ):
            adapter["m"]

    def test_half_a_module(self, tmp_path: Path) -> None:
        self.write(tmp_path, m__lora_A__weight=torch.ones(1, 1))
        with pytest.raises(InputError, match="m has no lora_B"), open_adapter(tmp_path):
            pass

    def test_no_adapter(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not a readable PEFT adapter"), open_adapter(tmp_path):
            pass
        self.write(tmp_path, m__lora_A__weight=torch.ones(1, 1))
        (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 20)
        with pytest.raises(InputError, match="not a readable PEFT adapter"), open_adapter(tmp_path):
            pass


def test_layers_of_modules() -> None:
    assert layer_of("model.layers.12.self_attn.q_proj") == 12
    assert layer_of("transformer.h.3.attn.c_attn") == 3
    assert layer_of("lm_head") == -1
