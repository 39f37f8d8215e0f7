"""The GPU kit (`make gpu`), in its small form on the CPU: what it compares, measures and writes."""

from __future__ import annotations

import copy
import json
import time
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.gpu import results, speed
from benchmarks.gpu.correctness import Bench, against_cpu, against_trl, all_checks, distance, micro_batch
from benchmarks.gpu.generation import with_vllm
from benchmarks.gpu.results import Speed, bars, checked, write
from benchmarks.gpu.setting import small
from benchmarks.gpu.speed import Track, log_normal_lengths, random_rollouts
from losslens.losses import builtin_losses
from losslens.losses.dpo import Dpo
from losslens.losses.sft import Sft
from losslens.models.loading import LoadedModel
from tools.reference import performance_of


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench("cpu", tmp_path_factory.mktemp("kit"))


def test_losses_pass_and_a_changed_weight_fails(bench: Bench) -> None:
    passed = [*against_cpu(bench, Sft(name="sft")), *against_trl(bench, Dpo(name="dpo"))]
    assert [(check.on, check.status) for check in passed] == 2 * [("cpu float32", "passed"), ("cpu bfloat16", "passed")]
    weight = bench.on_device["float32"].model.model.layers[0].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(1.02)
    changed = next(against_cpu(bench, Sft(name="sft")))
    with torch.no_grad():
        weight.div_(1.02)
    assert changed.status == "failed"
    assert changed.difference is not None
    assert 1e-3 < changed.difference < 1


def test_every_loss_is_compared_and_the_rest_too(bench: Bench) -> None:
    names = [name for name, _ in all_checks(bench)]
    assert [f"{loss} against the CPU" for loss in builtin_losses()] == names[: len(builtin_losses())]
    assert {"rows alone", "generation and scores", "resumption", "micro-batch"} < set(names)
    assert [check.status for check in micro_batch(bench)] == ["skipped"]


def test_distance_is_relative_to_the_expected_gradient() -> None:
    found = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    expected = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([-2.0])}
    assert distance(found, expected) == pytest.approx(5 / 13**0.5)  # √(4² + 3²)/√(3² + 2²)
    assert distance(expected, expected) == 0
    assert distance({"a": found["a"]}, expected) == float("inf")
    assert checked("", "", float("nan"), 1.0).status == "failed"


def test_lengths_have_their_mean_and_rows_their_lengths() -> None:
    lengths = log_normal_lengths(200_000, 1400, 10**9)
    assert lengths.mean() == pytest.approx(1400, rel=0.01)
    assert np.median(lengths) == pytest.approx(1400 * np.exp(-0.245), rel=0.01)  # e^(−σ²/2)
    assert log_normal_lengths(1000, 1400, 4096).max() == 4096
    table = random_rollouts(np.array([40, 24, 100, 9]), 50)
    assert (table["prompt_ids"].map(len) + table["completion_ids"].map(len)).tolist() == [40, 24, 100, 9]
    assert table["prompt_ids"].iloc[0] == table["prompt_ids"].iloc[1]
    assert table["reward"].tolist() == [1, 0, 1, 0]


def _speeds(rates: dict[tuple[str, str], float]) -> list[Speed]:
    return [Speed("sft", lengths, who, rate, utilisation=rate / 1000) for (lengths, who), rate in rates.items()]


def test_bars() -> None:
    speeds = _speeds({("log-normal", "ours"): 250.0, ("log-normal", "stock TRL"): 100.0, ("4096", "ours"): 549.0})
    found = {(bar["loss"], bar["bar"][:5]): (bar["figure"], bar["verdict"]) for bar in bars(speeds, "4096")}
    assert found["sft", "≥ 2.5"] == (2.5, "met")
    assert found["sft", "≥ 55%"] == (0.549, "not met")
    assert found["dpo", "≥ 2.5"] == found["grpo", "≥ 55%"] == (None, "not measured")


@pytest.fixture
def track(base: LoadedModel, tmp_path: Path) -> Track:
    return Track(small("cpu"), base, 1e9, tmp_path, time.monotonic() + 60)


def test_both_trainers_are_measured_on_the_same_tokens(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # as benchmarks/gpu/__main__.py
    monkeypatch.setattr(speed, "STEPS", 1)
    counted: list[int] = []
    tokens = speed._tokens
    monkeypatch.setattr(speed, "_tokens", lambda *given: counted.append(tokens(*given)) or counted[-1])
    for who in ("ours", "stock TRL"):
        found = track._cell("grpo", "64", who, time.monotonic() + 60)
        assert (found.note, found.steps, found.rows, found.checkpointing) == ("", 1, 8, False)
        assert found.tokens_per_second is not None
        parameters = track.base.model.num_parameters()
        assert found.utilisation == pytest.approx(4 * parameters * found.tokens_per_second / 1e9)
    assert counted == [8 * 64, 8 * 64]


def test_what_does_not_fit_is_not_tried_again(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, bool]] = []

    def timed(plan: Any, table: Any, who: str, lengths: str, shape: tuple[int, bool], end: float) -> Speed:
        tried.append(shape)
        if shape[0] * (2 if plan.method.name == "dpo" else 1) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return Speed(plan.method.name, lengths, who, 1.0, rows=shape[0], checkpointing=shape[1])

    monkeypatch.setattr(track, "_timed", timed)
    assert track._cell("sft", "64", "ours", 0.0).rows == 2
    assert tried == [(8, False), (4, False), (2, False)]
    tried.clear()
    assert track._cell("dpo", "64", "ours", 0.0).rows == 1  # a pair is two rows
    assert tried == [(1, False)]
    tried.clear()
    assert track._cell("sft", "64", "stock TRL", 0.0).rows == 2
    assert len(tried) == 3


def test_a_trainer_that_fails_or_comes_too_late_is_said(track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    def cell(loss: str, lengths: str, who: str, end: float) -> Speed:
        track.deadline = 0.0
        raise RuntimeError("no kernel")

    monkeypatch.setattr(track, "_cell", cell)
    notes = [each.note for each in track.measure(lambda text: None)]
    assert notes == ["RuntimeError: no kernel"] + 17 * ["out of time"]


def test_a_vllm_that_does_not_start_is_said_without_a_path(base: LoadedModel, tmp_path: Path) -> None:
    found = with_vllm(small("cpu"), base, "no-such-vllm serve", 1, tmp_path)
    assert found["tokens_per_second"] is None
    assert found["note"].startswith("vllm.command=no-such-vllm serve: no such program")
    ended = with_vllm(small("cpu"), copy.deepcopy(base), "false", 5, tmp_path)
    assert ended["note"] == "vllm.command: the server ended: it wrote nothing"


def test_tables_of_a_card(tmp_path: Path) -> None:
    speeds = _speeds({("log-normal", "ours"): 12345.0, ("log-normal", "stock TRL"): 4000.0})
    given = {
        "card": "NVIDIA H100 80GB HBM3",
        "small": False,
        "model": "36 layers",
        "command": "python -m benchmarks.gpu",
        "date": "2026-01-01",
        "commit": "abc",
        "versions": {"torch": "2.13"},
        "matmul_flops": 7e14,
        "flops": "4 · parameters · tokens",
        "checks": results.as_dicts([checked("sft = stock TRL", "cuda float32", 0.5, 1e-3)]),
        "speeds": results.as_dicts(speeds),
        "bars": bars(speeds, "4096"),
        "generation": [{"engine": "transformers", "tokens_per_second": 900.0, "note": ""}],
        "seconds": 400.0,
    }
    file = write(given, tmp_path / "results")
    assert file.name == "gpu-nvidia-h100-80gb-hbm3.json"
    page = performance_of(json.loads(file.read_text(encoding="utf-8")))
    assert "| sft | log-normal | ours | 12,345 |" in page
    assert "| ≥ 2.5× stock TRL on log-normal lengths | sft | 3.09 | met |" in page
    assert "1 failed, 0 skipped: sft = stock TRL (cuda float32)." in page
    console = Console(width=140, file=StringIO())
    results.show(given, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "12,345" in shown
    assert "700 TFLOP/s" in shown
