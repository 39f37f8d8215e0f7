"""Norms, cosines, map and clusters of many adapters: by hand, on the command line and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import losslens
from losslens.analysis.adapter_map import adapter_tables
from losslens.cli import compare
from losslens.measures.clustering import cluster
from losslens.measures.products import all_products
from losslens.updates.folder import write_adapter
from losslens.updates.lora import LoraUpdate

pytestmark = pytest.mark.fast

MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in "qv"]
CONFIG = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Three adapters near one update, two near another, of ranks 2 and 3."""
    rng = np.random.default_rng(0)
    centres = [{name: rng.normal(size=(12, 2)) for name in MODULES} for _ in range(2)]
    a = {name: rng.normal(size=(3, 8)) for name in MODULES}
    folders = []
    for number, (kind, rank) in enumerate([(0, 2), (1, 3), (0, 3), (1, 2), (0, 2)]):
        updates = {}
        for name in MODULES:
            b = np.zeros((12, rank))
            b[:, :2] = centres[kind][name] + 0.1 * rng.normal(size=(12, 2))
            updates[name] = LoraUpdate(b, a[name][:rank], 1.0 + number)
        folders.append(tmp_path / f"{'xy'[kind]}{number}")
        write_adapter(folders[-1], updates, CONFIG)
    return folders


def test_tables_by_hand() -> None:
    """In a plane at 0°, 30°, 120° and of length 0: one cluster of two, one alone, and one without a direction."""
    lengths, degrees = (1.0, 2.0, 3.0, 0.0), (0, 30, 120, 0)
    updates = [
        {"m": LoraUpdate(length * np.array([[np.cos(turn)], [np.sin(turn)]]), np.array([[1.0, 0.0]]), 1.0)}
        for length, turn in zip(lengths, np.radians(degrees), strict=True)
    ]
    runs, pairs, points, kept = adapter_tables(
        ["a", "b", "c", "zero"], ["m"], [(2, 2)], all_products(updates, ["m"], precision="float64")
    )
    assert runs["norm"].tolist() == pytest.approx(lengths)
    known = pairs.set_index(["run_a", "run_b"])["cosine"]
    assert known.loc[[("a", "b"), ("a", "c"), ("b", "c")]].tolist() == pytest.approx([0.75**0.5, -0.5, 0.0], abs=1e-12)
    assert known.drop([("a", "b"), ("a", "c"), ("b", "c")]).isna().all()
    by_run = runs.set_index("run")
    assert by_run["nearest"].tolist()[:3] == ["b", "a", "b"]
    assert by_run.loc["a", "cluster"] == by_run.loc["b", "cluster"] != by_run.loc["c", "cluster"]
    assert by_run.loc["zero", ["cluster", "place", "nearest"]].isna().all()
    assert sorted(by_run["place"].dropna()) == [0, 1, 2]
    # 0°, 30° and 120° lie on a line, b between the others.
    gaps = points.set_index("run")["x"]
    assert abs(gaps["a"] - gaps["b"]) == pytest.approx(30)
    assert abs(gaps["b"] - gaps["c"]) == pytest.approx(90)
    assert kept == pytest.approx(1)


def test_clusters_are_numbered_in_their_order_and_end_at_the_angle() -> None:
    """Two at 10°, two at 59.9°, each pair at 90° to the other: joined up to 60°, not up to 50°."""
    distances = np.full((4, 4), 90.0)
    distances[0, 2] = distances[2, 0] = 10.0
    distances[1, 3] = distances[3, 1] = 59.9
    np.fill_diagonal(distances, 0.0)
    for apart, count in ((60.0, 2), (50.0, 3), (90.0, 1), (5.0, 4)):
        found = cluster(distances, apart)
        assert set(found.labels) == set(range(1, count + 1))
        in_order = found.labels[np.argsort(found.places)]
        assert (np.diff(in_order) >= 0).all()
        assert sorted(found.places) == [0, 1, 2, 3]
    found = cluster(distances)
    assert found.labels[0] == found.labels[2] != found.labels[1] == found.labels[3]


@pytest.mark.parametrize("count", [0, 1])
def test_clusters_of_hardly_anything(count: int) -> None:
    assert len(cluster(np.zeros((count, count))).labels) == count


def test_the_command(adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*map(str, adapters), "--measures", "cosines", "--output-dir", str(tmp_path / "out")]
    assert compare.main(arguments) == 0
    folder = tmp_path / "out" / "adapters" / "analysis"
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    pairs, expected = pd.read_csv(folder / "pairs.csv"), losslens.compare(adapters)
    assert list(pairs) == ["run_a", "run_b", "cosine", "cosine_null"]
    for name in ("cosine", "cosine_null"):
        np.testing.assert_allclose(pairs[name], expected.pairs[name], atol=1e-6)
    runs = pd.read_csv(folder / "runs.csv")
    for name in ("norm", "effective_rank", "stable_rank"):
        np.testing.assert_allclose(runs[name], expected.runs[name], rtol=1e-6)
    assert runs.groupby("cluster")["run"].apply(set).tolist() in (
        [{"x0", "x2", "x4"}, {"y1", "y3"}], [{"y1", "y3"}, {"x0", "x2", "x4"}],
    )  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["adapters"]) == {folder.name for folder in adapters}
    page = (folder / "report.html").read_text()
    assert "5 adapters, 10 pairs: norms and cosines alone. 2 clusters: average linkage" in page
    assert '<input type="search"' in page
    assert "--measures all)" in page
    # The table of all pairs is beside the page, not in it.
    assert 'download="pairs.csv' not in page


def test_many_adapters_are_compared_by_cosines_unless_asked_otherwise(
    adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "_MANY", 4)
    given = [*map(str, adapters), "--output-dir", str(tmp_path / "out")]
    assert compare.main(given) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first == "5 adapters: norms, cosines, map and clusters alone; --measures all adds angles and layers"
    assert compare.main([*given[1:], "--output-dir", str(tmp_path / "few")]) == 0
    assert "alone" not in capsys.readouterr().out
    assert (tmp_path / "few" / "adapters" / "analysis" / "layers.csv").is_file()


def test_an_earlier_analysis_of_others_is_kept(
    adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--measures", "cosines", "--output-dir", str(tmp_path / "out")]
    assert compare.main([*map(str, adapters[:3]), *common]) == 0
    assert compare.main([*map(str, adapters[3:]), *common]) == 0
    assert "kept because the new one lacks 3 of its adapters" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "adapters").glob("analysis*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--measures", "cosines", "--base", "b"], "--measures cosines uses no base: leave out --base"),
        (["--measures", "angles"], "argument --measures: invalid choice"),
    ],
)
def test_refusals(arguments: list[str], said: str, adapters: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(adapters[0]), *arguments])
    assert stopped.value.code == 2
    [told] = capsys.readouterr().err.splitlines()
    assert said in told
