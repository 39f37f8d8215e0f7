"""A kind of update that knows nothing but its matrix goes through every measure, alone and beside LoRA."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
import torch

from losslens.measures.base_weights import principal, principal_parts
from losslens.measures.comparison import compare
from losslens.measures.forward import interpolated_model
from losslens.measures.tables import BaseComparison, ComparedWeights, weight_tables
from losslens.measures.tracking import WeightTracker
from losslens.measures.trajectory import interpolate, trajectory
from losslens.models.loading import LoadedModel
from losslens.updates.base import Update, forward_matrices, pair_products, pairs_of
from losslens.updates.lora import LoraUpdate
from tests.test_subspaces import random_delta

pytestmark = pytest.mark.fast

SHAPES = {"model.layers.0.q_proj": (40, 30), "model.layers.0.o_proj": (25, 50), "model.layers.1.q_proj": (40, 30)}
MODULES = list(SHAPES)
# Which of four runs are dense.
MIXES = [set(which) for count in (1, 2, 4) for which in combinations(range(4), count)]


@dataclass(frozen=True)
class DenseUpdate(Update):
    weight: np.ndarray

    def dense(self) -> np.ndarray:
        return self.weight

    def arrays(self) -> dict[str, np.ndarray]:
        return {"W": self.weight}

    def with_arrays(self, arrays: Mapping[str, np.ndarray]) -> DenseUpdate:
        return DenseUpdate(arrays["W"])

    def __rmul__(self, factor: float) -> DenseUpdate:
        return DenseUpdate(factor * self.weight)

    def __add__(self, other: DenseUpdate) -> DenseUpdate:
        return DenseUpdate(self.weight + other.weight)


Run = dict[str, LoraUpdate]


@pytest.fixture
def runs() -> list[Run]:
    """The first two from one initial A; ranks above and below the number of directions compared."""
    rng = np.random.default_rng(11)
    found = [{m: random_delta(rng, *shape, rank) for m, shape in SHAPES.items()} for rank in (6, 6, 3, 8)]
    found[1] = {m: LoraUpdate(u.b + rng.standard_normal(u.b.shape), u.a, u.scale) for m, u in found[0].items()}
    return found


@pytest.fixture
def initial(runs: list[Run]) -> Run:
    rng = np.random.default_rng(12)
    return {m: LoraUpdate(0 * u.b, u.a + 0.1 * rng.standard_normal(u.a.shape), u.scale) for m, u in runs[0].items()}


def densely(run: Run) -> dict[str, Update]:
    return {module: DenseUpdate(update.dense()) for module, update in run.items()}


def mixed(runs: list[Run], which: set[int]) -> list[Mapping[str, Update]]:
    return [densely(run) if n in which else run for n, run in enumerate(runs)]


@pytest.mark.parametrize("which", MIXES, ids=str)
def test_the_comparison_of_a_mix_is_that_of_lora(which: set[int], runs: list[Run], initial: Run) -> None:
    """All tables, W0 measures among them; but that a dense update has no drift, nor a null within A's inputs."""
    rng = np.random.default_rng(13)
    weights = {module: rng.standard_normal(shape) for module, shape in SHAPES.items()}

    def tables(compared: list[Mapping[str, Update]]) -> list[tuple[str, object]]:
        of_runs, of_pairs = compare(compared, MODULES, top=5, initial=[initial] * 4)
        bases = {module: principal(weight, 5) for module, weight in weights.items()}
        against = {
            str(n): BaseComparison.of(
                np.array([bases[module].norm for module in MODULES]),
                [principal_parts(run[module], initial[module].input_space(), bases[module]) for module in MODULES],
            )
            for n, run in enumerate(compared)
        }
        named = {(str(i), str(j)): pair for (i, j), pair in of_pairs.items()}
        runs_by_name = {str(n): run for n, run in enumerate(of_runs)}
        found = weight_tables(ComparedWeights(MODULES, list(SHAPES.values()), runs_by_name, named, 5, against))
        overlaps = [("right_overlap", pair.right_overlap) for pair in of_pairs.values()]
        return [*vars(found).items(), *overlaps]

    for (name, expected), (_, table) in zip(tables(list(runs)), tables(mixed(runs, which)), strict=True):
        if name == "right_overlap":
            assert np.allclose(table, expected, rtol=1e-9)
            continue
        assert list(table.columns) == list(expected.columns)
        dense = [run in map(str, which) for run in expected["run"]] if "run" in expected else None
        for column in expected:
            for row, (value, wanted) in enumerate(zip(table[column], expected[column], strict=True)):
                if dense and dense[row] and column.startswith("drift"):
                    assert np.size(value) == 0 or np.isnan(value)
                elif dense and dense[row] and column == "principal_right_null":
                    assert 0 < value < 1  # of all inputs, not of those of an initial A
                elif isinstance(wanted, str):
                    assert value == wanted
                else:
                    value, wanted = (np.atleast_1d(v)[~np.isnan(np.atleast_1d(v))] for v in (value, wanted))
                    assert np.allclose(value, wanted, rtol=1e-9, atol=1e-9), (name, column)


@pytest.mark.parametrize("fresh", [1, 3, 4])
@pytest.mark.parametrize("which", MIXES, ids=str)
def test_products_of_a_mix(which: set[int], fresh: int, runs: list[Run]) -> None:
    """In the order of the pairs, whatever their kinds; both formulas of the overlap are the dense one."""
    for module in MODULES:
        updates = [run[module] for run in mixed(runs, which)]
        inner, overlap = pair_products(updates, fresh)
        matrices = [run[module].dense() for run in runs]
        pairs = pairs_of(4, fresh)
        assert np.allclose(inner, [np.sum(matrices[i] * matrices[j]) for i, j in pairs], rtol=1e-10)
        expected = [np.linalg.norm(matrices[i] @ matrices[j].T) ** 2 for i, j in pairs]
        assert np.allclose(overlap, expected, rtol=1e-10)
        assert np.allclose([updates[i].right_overlap(updates[j]) for i, j in pairs], expected, rtol=1e-10)
        assert np.allclose([updates[j].inner(updates[i]) for i, j in pairs], inner, rtol=1e-10)


def test_a_trajectory(runs: list[Run]) -> None:
    """Of dense snapshots towards a LoRA and a dense target; the point between two of them is the same matrix."""
    expected = trajectory(runs[:3], [runs[3], runs[2]], MODULES)
    points = [densely(run) for run in runs[:3]]
    found = trajectory(points, [runs[3], points[2]], MODULES)
    for name, values in vars(expected).items():
        assert np.allclose(getattr(found, name), values, rtol=1e-10), name
    for module in MODULES:
        for before in (None, 0):
            lora, dense = (
                interpolate(None if before is None else run[before][module], run[1][module], 0.25)
                for run in (runs, points)
            )
            assert np.allclose(dense.dense(), lora.dense(), rtol=1e-12)


def test_a_run_that_trains(runs: list[Run], initial: Run) -> None:
    """The same numbers at every logged step, without drift; what a checkpoint keeps makes the same update again."""
    lora = WeightTracker(initial, {"other": runs[3]}, MODULES, top=3)
    dense = WeightTracker(
        {m: DenseUpdate(0 * u.dense()) for m, u in initial.items()}, {"other": runs[3]}, MODULES, top=3
    )
    for run in runs[:3]:
        expected, found = lora.measure(run), dense.measure(densely(run))
        assert expected.keys() - found.keys() == {"drift_min", "drift_max"}
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-9)
    for update in (runs[0][MODULES[0]], densely(runs[0])[MODULES[0]]):
        again = update.with_arrays({name: array.copy() for name, array in update.arrays().items()})
        assert type(again) is type(update)
        assert np.array_equal(again.dense(), update.dense())


def test_an_update_of_0_has_no_direction() -> None:
    zero = DenseUpdate(np.zeros((6, 4)))
    assert zero.svd().values.shape == (0,)
    assert zero.svd().left.shape == (6, 0)


@pytest.mark.parametrize("which", [{0}, {1}, {0, 1}], ids=str)
def test_a_forward_pass_on_the_line(which: set[int], base: LoadedModel) -> None:
    """In double precision the logits at each point of a line are those of the LoRA path to 1e-9."""
    model = copy.deepcopy(base.model).double()
    rng = np.random.default_rng(14)
    shapes = {"model.layers.0.self_attn.q_proj": (128, 128), "model.layers.1.self_attn.k_proj": (64, 128)}
    ends = [
        {m: LoraUpdate(rng.standard_normal((o, 3)), rng.standard_normal((3, i)), s) for m, (o, i) in shapes.items()}
        for s in (0.02, -0.01)
    ]
    ids = torch.randint(5, model.config.vocab_size, (2, 15), generator=torch.Generator().manual_seed(0))
    found = []
    for line in (ends, mixed(ends, which)):
        with interpolated_model(model, list(shapes), *line) as (carrying, set_weights), torch.no_grad():
            logits = []
            for weight in (0.0, 0.3, 1.0):
                set_weights([1 - weight, weight])
                logits.append(carrying(ids).logits.clone())
        found.append(torch.stack(logits))
    assert (found[0] - found[1]).abs().max() < 1e-9
    assert (found[0][0] - found[0][2]).abs().max() > 0.01


def test_matrices_multiply_to_the_sum(runs: list[Run]) -> None:
    for module in MODULES:
        first, second = runs[0][module], runs[2][module]
        expected = 0.25 * first.dense() + 0.75 * second.dense()
        for updates in ((first, second), (first, DenseUpdate(second.dense()))):
            product = np.eye(expected.shape[1])
            for matrix in forward_matrices(updates, [0.25, 0.75]):
                product = matrix @ product
            assert np.allclose(product, expected, rtol=1e-12)
