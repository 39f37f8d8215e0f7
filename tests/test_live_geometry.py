"""Weight tracking during training: by hand, against the dense computation, and equal to the analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import subspace_angles

from losslens.losses import Batch
from losslens.losses.dft import Dft
from losslens.losses.grpo import Grpo
from losslens.losses.sft import Sft
from losslens.measures import weight_measures
from losslens.measures.comparison import compare
from losslens.measures.definitions.weight_space import effective_rank, stable_rank
from losslens.measures.tables import ComparedWeights, weight_tables
from losslens.measures.tracking import WeightTracker
from losslens.models.loading import LoadedModel
from losslens.updates.folder import open_adapter
from losslens.updates.lora import LoraUpdate
from tests.conftest import train_frozen
from tests.test_subspaces import random_delta

SHAPES = {"layers.0.attn.q_proj": (12, 9), "layers.0.attn.v_proj": (7, 9), "layers.1.attn.q_proj": (12, 9)}
START = {module: LoraUpdate(np.zeros((out, 2)), np.eye(2, into), 1.0) for module, (out, into) in SHAPES.items()}


def point(rng: np.random.Generator, rank: int = 2) -> dict[str, LoraUpdate]:
    return {module: random_delta(rng, *shape, rank) for module, shape in SHAPES.items()}


def one(b: list[float], a: list[float], scale: float = 1.0) -> dict[str, LoraUpdate]:
    """One module of rank 1."""
    return {"layers.3.q_proj": LoraUpdate(np.array([b]).T, np.array([a]), scale)}


def test_by_hand() -> None:
    """ΔW = 0, then 2·(3, 0)ᵀ(1, 0), then 2·(3, 4)ᵀ(1, 0), against (0, 5)ᵀ(0, 1) + nothing."""
    live = WeightTracker(one([0, 0], [1, 1]), {"other": one([0, 5], [1, 0])}, ["layers.3.q_proj"])
    nothing = live.measure(one([0, 0], [1, 1], 2.0))
    assert nothing == {
        "norm": 0.0, "norm/layer_3": 0.0, "norm/q_proj": 0.0, "drift_min": pytest.approx(0, abs=1e-6),
        "drift_max": pytest.approx(0, abs=1e-6),
    }  # fmt: skip
    first = live.measure(one([3, 0], [1, 0], 2.0))
    assert first["norm"] == first["norm/layer_3"] == first["norm/q_proj"] == pytest.approx(6)
    assert first["effective_rank"] == first["stable_rank"] == pytest.approx(1)
    assert first["drift_min"] == first["drift_max"] == pytest.approx(45)  # from (1, 1) to (1, 0)
    assert first["cosine_to_other"] == pytest.approx(0)
    assert first["angle_min_left_to_other"] == pytest.approx(90)
    assert first["angle_min_right_to_other"] == pytest.approx(0, abs=1e-6)
    assert "cosine_to_previous" not in first  # from 0 no direction can be told
    second = live.measure(one([3, 4], [1, 0], 2.0))
    assert second["norm"] == pytest.approx(10)
    assert second["cosine_to_previous"] == pytest.approx(0.6)
    assert second["cosine_of_steps"] == pytest.approx(0)  # (6, 0), then (0, 8)
    assert second["cosine_to_other"] == pytest.approx(0.8)
    assert second["angle_min_left_to_other"] == pytest.approx(np.degrees(np.arccos(0.8)))


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_is_the_dense_computation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, other = [point(rng) for _ in range(3)], point(rng, 3)
    live = WeightTracker(START, {"other": other}, list(SHAPES))
    [_, _, found] = [live.measure(each) for each in points]
    p, q, r, o = ({module: delta.dense() for module, delta in each.items()} for each in (*points, other))

    def flat(each: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([each[module].ravel() for module in SHAPES])

    def between(first: np.ndarray, second: np.ndarray) -> float:
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    expected = {
        "norm": np.linalg.norm(flat(r)),
        "norm/layer_0": np.hypot(*(np.linalg.norm(r[f"layers.0.attn.{name}_proj"]) for name in "qv")),
        "norm/layer_1": np.linalg.norm(r["layers.1.attn.q_proj"]),
        "norm/q_proj": np.hypot(*(np.linalg.norm(r[f"layers.{i}.attn.q_proj"]) for i in (0, 1))),
        "norm/v_proj": np.linalg.norm(r["layers.0.attn.v_proj"]),
        "cosine_to_previous": between(flat(r), flat(q)),
        "cosine_of_steps": between(flat(r) - flat(q), flat(q) - flat(p)),
        "cosine_to_other": between(flat(r), flat(o)),
    }
    spectra = [np.linalg.svd(r[module], compute_uv=False)[:2] for module in SHAPES]
    expected["effective_rank"] = np.mean([effective_rank(values) for values in spectra])
    expected["stable_rank"] = np.mean([stable_rank(values) for values in spectra])
    # Of either as many leading directions as the one of the smaller rank has, as in pairs.csv.
    for side, turn in (("left", np.asarray), ("right", np.transpose)):
        leading = [[np.linalg.svd(turn(each[module]))[0][:, :2] for each in (r, o)] for module in SHAPES]
        smallest = [subspace_angles(*both)[-1] for both in leading]
        expected[f"angle_min_{side}_to_other"] = np.degrees(np.median(smallest))
        if side == "left":
            shares = [np.sum((a.T @ b) ** 2) / 2 for a, b in leading]
            chances = [2 / len(r[module]) for module in SHAPES]
            beyond = [(share - chance) / (1 - chance) for share, chance in zip(shares, chances, strict=True)]
            expected["overlap_left_to_other"] = np.mean(beyond)
    drift = [np.degrees(subspace_angles(START[m].a.T, points[2][m].a.T)) for m in SHAPES]
    expected["drift_max"] = np.median([values[0] for values in drift])
    expected["drift_min"] = np.median([values[-1] for values in drift])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-7), name


def test_rotating_the_factors_changes_nothing() -> None:
    """B·A = (B·T)·(T⁻¹·A): the numbers are the update's, not its factors'."""
    rng = np.random.default_rng(0)
    before, now, other = point(rng), point(rng), point(rng)
    turn = rng.standard_normal((2, 2))
    turned = {m: LoraUpdate(d.b @ turn, np.linalg.inv(turn) @ d.a, d.scale) for m, d in now.items()}
    plain, other_way = (WeightTracker(START, {"other": other}, list(SHAPES)) for _ in range(2))
    for live in (plain, other_way):
        live.measure(before)
    assert other_way.measure(turned) == pytest.approx(plain.measure(now), rel=1e-9, abs=1e-7)


def test_a_run_logs_what_analyze_finds_in_its_adapter(
    make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    quiet = {"log_steps": 2, "save_steps": 2, "max_steps": 7}  # the last step is logged, too
    for name, method in (("sft", Sft(name="sft")), ("grpo", Grpo(name="grpo"))):
        (tmp_path / name).mkdir()
        references = {"sft": tmp_path / "sft" / "adapter"} if name == "grpo" else {}
        train_frozen(make_plan(method, **quiet), base, tokenised, tmp_path / name, lambda *_: None, references)
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    logged = {k.removeprefix("geometry/"): v for k, v in lines[-1].items() if k.startswith("geometry/")}
    assert 0 < logged.pop("share_of_time") < 1
    assert lines[-1]["train/tokens_per_second"] > 0

    plan = make_plan(Sft(name="sft"))
    folders = [tmp_path / "grpo" / "adapter", tmp_path / "sft" / "adapter", plan.initial_adapter]
    with open_adapter(folders[0]) as grpo, open_adapter(folders[1]) as sft, open_adapter(folders[2]) as start:
        modules = grpo.modules
        runs, pairs = compare([grpo, sft], modules, initial=[start, start])
        shapes = [grpo[module].shape for module in modules]
    named = dict(zip(("grpo", "sft"), runs, strict=True))
    tables = weight_tables(ComparedWeights(modules, shapes, named, {("grpo", "sft"): pairs[0, 1]}, 10))
    run, pair = tables.runs.set_index("run").loc["grpo"], tables.pairs.iloc[0]
    assert logged.pop("norm") == pytest.approx(run["norm"], rel=1e-12)
    for name in ("effective_rank", "stable_rank", "drift_min", "drift_max"):
        assert logged.pop(name) == pytest.approx(run[name], rel=1e-9)
    assert logged.pop("cosine_to_sft") == pytest.approx(pair["cosine"], rel=1e-12)
    for measure in weight_measures("main")[1:]:
        assert logged.pop(f"{measure.name}_to_sft") == pytest.approx(pair[measure.name], rel=1e-9)
    of_modules = tables.run_modules[tables.run_modules["run"] == "grpo"]
    for layer, rows in of_modules.groupby("layer"):
        assert logged.pop(f"norm/layer_{layer}") == pytest.approx(np.linalg.norm(rows["norm"]), rel=1e-12)
    for projection, rows in of_modules.groupby(of_modules["module"].str.rpartition(".")[2]):
        assert logged.pop(f"norm/{projection}") == pytest.approx(np.linalg.norm(rows["norm"]), rel=1e-12)
    assert 0.5 < logged.pop("cosine_to_previous") < 1
    assert -1 < logged.pop("cosine_of_steps") < 1
    assert not logged


@pytest.mark.parametrize("method", [Sft(name="sft"), Dft(name="dft"), Grpo(name="grpo")], ids=lambda m: m.name)
def test_weights_are_what_the_gradient_multiplies(
    method: Any, make_plan: Any, base: LoadedModel, tokenised: pd.DataFrame, tmp_path: Path
) -> None:
    """SFT pulls at every token with 1, DFT with its probability, GRPO with the rollout's advantage."""
    seen: list[Batch] = []

    class Watched(type(method)):  # type: ignore[misc]
        def terms(self, batch: Batch) -> Any:
            seen.append(batch)
            return super().terms(batch)

    plan = make_plan(Watched(name=method.name), max_steps=1, log_steps=1)
    train_frozen(plan, base, tokenised, tmp_path)
    batch, logged = seen[-1], json.loads((tmp_path / "metrics.jsonl").read_text())
    logps, correct = batch.logps.detach(), batch.correct[:, None]
    by_token = {
        "sft": lambda: logps * 0 + 1,
        "dft": logps.exp,
        "grpo": lambda: batch.columns["advantage"][:, None] + logps * 0,
    }
    weights = by_token[method.name]()
    for name, tokens in (("correct", correct & batch.mask), ("incorrect", ~correct & batch.mask)):
        assert logged[f"train/weight/{name}"] == pytest.approx(weights[tokens].mean().item(), rel=1e-5)
    pulls = weights[batch.mask].abs()
    assert logged["train/weight/zero"] == (pulls < 1e-6).float().mean().item()
    effective = pulls.sum() ** 2 / (len(pulls) * (pulls**2).sum())
    assert logged["train/weight/effective"] == pytest.approx(effective.item(), rel=1e-5)
