"""Products of many adapters in blocks: equal to those of single pairs, by hand, and read once per block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from safetensors.numpy import save_file

from losslens.core.files import write_json
from losslens.measures import get_measure
from losslens.measures.comparison import compare
from losslens.measures.products import Precision, all_products, product_weights
from losslens.measures.tables import ComparedWeights, pair_weights
from losslens.updates.base import Array, Update
from losslens.updates.folder import open_adapter
from losslens.updates.lora import LoraUpdate

pytestmark = pytest.mark.fast

SHAPES = {"a.0.q": (40, 30), "a.0.k": (12, 50), "a.1.o": (20, 20)}


def lora(rng: np.random.Generator, shape: tuple[int, int], rank: int, scale: float) -> LoraUpdate:
    return LoraUpdate(rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1])), scale)


def mixed() -> list[dict[str, LoraUpdate]]:
    """Adapters of ranks 1 to 8 and of very different scales; one has no B in one module."""
    rng = np.random.default_rng(0)
    drawn = [
        {module: lora(rng, shape, rank, scale) for module, shape in SHAPES.items()}
        for rank, scale in ((3, 0.5), (8, -2.0), (1, 1e-3), (5, 1e4), (8, 1e-40), (2, 1.0), (3, 3.0))
    ]
    drawn[5]["a.0.k"] = 0.0 * drawn[5]["a.0.k"]
    return drawn


@pytest.mark.parametrize("block_bytes", [1, 8000, 2**29])
@pytest.mark.parametrize(("precision", "within"), [("float64", 1e-12), ("float32", 1e-6)])
def test_equals_the_comparison_of_single_pairs(block_bytes: int, precision: Precision, within: float) -> None:
    adapters, names = mixed(), [f"r{n}" for n in range(7)]
    runs, pairs = compare(adapters, list(SHAPES))
    products = all_products(adapters, list(SHAPES), precision=precision, block_bytes=block_bytes)
    by_name = {(names[i], names[j]): pair for (i, j), pair in pairs.items()}
    compared = ComparedWeights(
        list(SHAPES), list(SHAPES.values()), dict(zip(names, runs, strict=True)), by_name, top=10
    )
    expected, found = pair_weights(compared), product_weights(products, list(SHAPES.values()), slice(None))
    for name in ("squared_a", "squared_b"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    measure = get_measure("cosine")
    np.testing.assert_allclose(measure.value(found), measure.value(expected), rtol=0, atol=within)
    np.testing.assert_allclose(measure.null(found), measure.null(expected), rtol=2 * within)
    for number, run in enumerate(runs):
        width = run.singular_values.shape[1]
        np.testing.assert_allclose(
            np.nan_to_num(products.singular_values[number, :, :width]),
            np.nan_to_num(run.singular_values),
            atol=1e-7 * np.nanmax(run.singular_values),
        )


def test_by_hand() -> None:
    """ΔW = 2·e₁e₁ᵀ and ΔW' = e₁e₁ᵀ + e₂e₂ᵀ: ⟨ΔW, ΔW'⟩ = 2, ‖ΔWΔW'ᵀ‖² = 4, the cosine 2/(2·√2) = 1/√2."""
    one = LoraUpdate(np.eye(3)[:, :1], np.eye(4)[:1], 2.0)
    two = LoraUpdate(np.eye(3)[:, :2], np.eye(4)[:2], 1.0)
    found = all_products([{"m": one}, {"m": two}], ["m"])
    assert found.inner.item() == pytest.approx(2)
    assert found.right_overlap.item() == pytest.approx(4)
    np.testing.assert_allclose(found.singular_values[:, 0], [[2, np.nan], [1, 1]], rtol=1e-12)
    assert get_measure("cosine").value(product_weights(found, [(3, 4)], slice(None))).item() == pytest.approx(0.5**0.5)


class Counted(Mapping[str, LoraUpdate]):
    """Counts how often each update is read."""

    reads: ClassVar[Counter[int]] = Counter()

    def __init__(self, number: int, updates: Mapping[str, LoraUpdate]) -> None:
        self.number, self.updates = number, updates

    def __getitem__(self, module: str) -> LoraUpdate:
        self.reads[self.number] += 1
        return self.updates[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)


@pytest.mark.parametrize(
    ("adapters_in_block", "reads"), [(6, [1] * 6), (3, [1, 1, 1, 2, 2, 2]), (2, [1, 1, 2, 2, 3, 3])]
)
def test_each_adapter_is_read_once_per_block(adapters_in_block: int, reads: list[int]) -> None:
    rng = np.random.default_rng(1)
    adapters = [Counted(n, {"m": lora(rng, (10, 6), 2, 1.0)}) for n in range(6)]
    Counted.reads.clear()
    all_products(adapters, ["m"], block_bytes=adapters_in_block * 2 * (10 + 6) * 4)
    assert [Counted.reads[n] for n in range(6)] == reads


class Dense(Update):
    """A kind of update that knows its matrix alone."""

    def __init__(self, matrix: Array) -> None:
        self.matrix = matrix

    def dense(self) -> Array:
        return self.matrix

    def arrays(self) -> dict[str, Array]:
        return {"W": self.matrix}

    def with_arrays(self, arrays: Mapping[str, Array]) -> Dense:
        return Dense(arrays["W"])

    def __rmul__(self, factor: float) -> Dense:
        return Dense(factor * self.matrix)

    def __add__(self, other: Dense) -> Dense:
        return Dense(self.matrix + other.matrix)


def test_any_kind_of_update() -> None:
    rng = np.random.default_rng(2)
    one, two = lora(rng, (6, 5), 2, 1.5), Dense(rng.normal(size=(6, 5)))
    found = all_products([{"m": one}, {"m": two}], ["m"], precision="float64")
    assert found.inner.item() == pytest.approx(np.vdot(one.dense(), two.dense()), rel=1e-12)
    assert found.right_overlap.item() == pytest.approx(np.sum((one.dense() @ two.dense().T) ** 2), rel=1e-12)


@pytest.mark.parametrize("update", [LoraUpdate(np.zeros((4, 2)), np.ones((2, 3)), 1.0)])
def test_a_zero_update_has_no_direction(update: LoraUpdate) -> None:
    other = lora(np.random.default_rng(3), (4, 3), 2, 1.0)
    view = product_weights(all_products([{"m": update}, {"m": other}], ["m"]), [(4, 3)], slice(None))
    assert np.isnan(get_measure("cosine").value(view)).all()


def test_from_several_files(tmp_path: Path) -> None:
    """An adapter in two shards, as 16-bit floats, beside one in a single file."""
    rng = np.random.default_rng(4)
    modules, folders = ["x.layers.0.q_proj", "x.layers.1.q_proj"], []
    for shards in (1, 2):
        folder = tmp_path / f"in{shards}"
        folder.mkdir()
        write_json(folder / "adapter_config.json", {
            "peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"], "bias": "none",
        })  # fmt: skip
        tensors = {
            module: {
                f"base_model.model.{module}.lora_{name}.weight": rng.normal(size=shape).astype(np.float16)
                for name, shape in (("A", (3, 8)), ("B", (5, 3)))
            }
            for module in modules
        }
        if shards == 1:
            save_file(tensors[modules[0]] | tensors[modules[1]], folder / "adapter_model.safetensors")
        for number, module in enumerate(modules if shards == 2 else [], 1):
            save_file(tensors[module], folder / f"adapter_model-{number:05d}-of-00002.safetensors")
        folders.append(folder)
    with open_adapter(folders[0]) as one, open_adapter(folders[1]) as two:
        _, pairs = compare([one, two], modules)
        found = all_products([one, two], modules, precision="float64")
    np.testing.assert_allclose(found.inner[0], pairs[0, 1].inner, rtol=1e-10)
