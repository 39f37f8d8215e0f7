"""The registry of measures: what holds of each, and that all which shows measures shows these."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from losslens.analysis.accuracy import RUN_COLUMNS
from losslens.analysis.arm_summary import COLUMNS as ABLATION_COLUMNS
from losslens.analysis.console import show
from losslens.analysis.repeats import COLUMNS as ARM_PAIR_COLUMNS
from losslens.measures import (
    RunMeasure,
    WeightMeasure,
    function_measures,
    get_measure,
    glossary_terms,
    pair_measures,
    run_measures,
    run_weight_measures,
    weight_measures,
)
from losslens.measures.comparison import compare
from losslens.measures.gradients import Gradient, gradient_products
from losslens.measures.tables import ComparedWeights, WeightTables, weight_tables
from losslens.measures.tracking import WeightTracker
from losslens.tracking.panels import GEOMETRY, TO_REFERENCE
from losslens.updates.lora import LoraUpdate
from tools.reference import written

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
SHAPES = {"layers.0.q": (9, 7), "layers.0.v": (6, 8), "layers.1.q": (9, 7)}


def adapter(seed: int, rank: int = 3) -> dict[str, LoraUpdate]:
    rng = np.random.default_rng(seed)
    return {
        module: LoraUpdate(rng.standard_normal((out, rank)), rng.standard_normal((rank, into)), 0.5)
        for module, (out, into) in SHAPES.items()
    }


def tables(adapters: dict[str, dict[str, LoraUpdate]]) -> WeightTables:
    runs, pairs = compare(list(adapters.values()), list(SHAPES), top=3)
    names = list(adapters)
    named = {(names[i], names[j]): pair for (i, j), pair in pairs.items()}
    # The updates as gradients, equal on both halves of the problems.
    halves = [{module: 0.5 * update for module, update in run.items()} for run in adapters.values()]
    products = gradient_products(list(map(Gradient, adapters.values(), halves)), list(SHAPES))
    return weight_tables(
        ComparedWeights(
            list(SHAPES), list(SHAPES.values()), dict(zip(names, runs, strict=True)), named, 3,
            pair_gradients={(names[i], names[j]): products.of(i, j) for i, j in pairs},
            same_a=dict.fromkeys(named, False),
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def found() -> WeightTables:
    first = adapter(0)
    return tables({"a": first, "again": first, "b": adapter(1), "other rank": adapter(2, 2)})


@pytest.mark.parametrize("measure", weight_measures(), ids=lambda m: m.name)
class TestWeights:
    def test_identical_updates(self, measure: WeightMeasure, found: WeightTables) -> None:
        for table in (found.pairs, found.layers, found.modules):
            if measure.name not in table:
                assert measure not in weight_measures("more")
                continue
            same = table[(table["run_a"] == "a") & (table["run_b"] == "again")]
            assert same[measure.name].to_numpy() == pytest.approx(measure.identical, abs=1e-6)

    def test_the_same_both_ways(self, measure: WeightMeasure, found: WeightTables) -> None:
        turned = tables({"other rank": adapter(2, 2), "b": adapter(1)}).pairs
        pair = found.pairs[(found.pairs["run_a"] == "b") & (found.pairs["run_b"] == "other rank")]
        for name in (measure.name, *[f"{measure.name}_null"] * measure.has_null):
            assert turned[name].to_numpy() == pytest.approx(pair[name].to_numpy(), rel=1e-9)

    def test_of_one_module_it_is_the_modules(self, measure: WeightMeasure, found: WeightTables) -> None:
        """Layer 1 has one module."""
        if measure not in weight_measures("more"):
            assert measure.name not in found.layers
            return
        keys = ["run_a", "run_b"]
        layer = found.layers[found.layers["layer"] == 1].set_index(keys)[measure.name]
        module = found.modules[found.modules["layer"] == 1].set_index(keys)[measure.name]
        pd.testing.assert_series_equal(layer, module)

    def test_within_its_bounds(self, measure: WeightMeasure, found: WeightTables) -> None:
        low, high = measure.bounds or (0, np.inf)
        values = found.modules[measure.name]
        assert values.between(low - 1e-9, high + 1e-9).all()


def test_an_update_of_zero_shows_nothing() -> None:
    nothing = {module: 0.0 * update for module, update in adapter(0).items()}
    found = tables({"a": adapter(1), "nothing": nothing})
    zero = found.runs.set_index("run").loc["nothing"]
    assert zero["norm"] == 0
    assert zero[[m.name for m in run_weight_measures() if m.name != "norm" and m.logged]].isna().all()
    assert found.pairs[[m.name for m in weight_measures()]].isna().all(axis=None)


def test_every_measure_has_its_columns(found: WeightTables) -> None:
    for measure in run_weight_measures():
        assert measure.name in found.runs
        assert measure.name in found.run_modules
    for measure in run_measures():
        assert measure.name in RUN_COLUMNS
        assert {measure.name, f"{measure.name}_std"} <= set(ABLATION_COLUMNS)
    for measure in pair_measures():
        assert {f"{measure.name}{end}" for end in measure.endings} <= set(ARM_PAIR_COLUMNS)
    for measure in pair_measures("main"):
        assert {f"{measure.name}_to_sft{end}" for end in measure.endings} <= set(ABLATION_COLUMNS)


def test_the_terminal_shows_the_main_ones(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run = {"run": "x", "label": "x", "method": "sft", "arm": "sft"}
    runs = pd.DataFrame([run | dict.fromkeys(RUN_COLUMNS[8:], 0.5)])
    pair = {"arm_a": "sft", "arm_b": "dpo", **dict.fromkeys(ARM_PAIR_COLUMNS[2:], 0.5)}
    pairs = pd.DataFrame([pair | {"pairing": "same init", "cosine_verdict": "related"}])
    show(
        runs.assign(diverged=""),
        pairs.assign(accuracy_diff=np.nan),
        pd.DataFrame({"seeds": [1], "samples": "frozen", "alias_of": "", "arm": "sft"}),
        pd.DataFrame(),
        {},
    )
    shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", " ", capsys.readouterr().out).split())
    for measure in (*run_measures("more"), *pair_measures("main")):
        assert f"{measure.heading} " in shown, measure.name


def test_what_is_logged_has_its_panel() -> None:
    live = WeightTracker(adapter(0), {"sft": adapter(1)}, list(SHAPES)).measure(adapter(2))
    for measure in run_weight_measures():
        assert (measure.name in live) == measure.logged
        assert (f"geometry/{measure.name}" in GEOMETRY) == measure.logged
    for measure in weight_measures():
        assert (f"{measure.name}_to_sft" in live) == (measure in weight_measures("main"))
        assert (f"geometry/{measure.name}_to_" in TO_REFERENCE) == (measure in weight_measures("main"))


@pytest.mark.parametrize("page", ["measures.md", "metrics.md"])
def test_the_reference_is_what_the_measures_say(page: str) -> None:
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written(text) == text, "out of date: make docs"
    for measure in (*run_measures(), *pair_measures()) if page == "measures.md" else ():
        assert f"| `{measure.name}` |" in text


def test_each_is_told_once_and_fully() -> None:
    measures = [*run_measures(), *weight_measures(), *function_measures()]
    assert len({m.place for m in measures}) == len({m.label for m in measures}) == len(measures)
    for measure in measures:
        assert measure.definition
        assert (measure.term or measure.label) in glossary_terms() or measure.tier != "main"
    with pytest.raises(StopIteration):
        get_measure("nobody")
    assert isinstance(get_measure("norm"), RunMeasure)


def test_numbers_are_written_by_their_unit() -> None:
    shown = {"cosine": (-0.10449, "−0.104"), "angle_min_left": (17.66, "17.7°"), "relative_norm": (0.0176, "1.8%")}
    for name, (value, text) in shown.items():
        assert get_measure(name).show(value) == text
    assert get_measure("norm").show(float("nan")) == "–"
